"""Running models from a program."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qcompile.compiler.api.door import door
from qcompile.compiler.api.models import Model, PathLike, on_disk
from qcompile.compiler.data.tokens import load_tokenizer
from qcompile.compiler.measure.generate import Sampling, answer
from qcompile.compiler.measure.loaded import Subject
from qcompile.runtime import sessions


@door
def session(
    model: Model,
    *,
    providers: Sequence[str] = ("cpu",),
    kernels: str = "auto",
    accuracy_level: int = 0,
    threads: int | None = None,
) -> Any:
    """An `onnxruntime.InferenceSession` of a model, with the native kernels registered where there are any.

    Args:
        model: a path, bytes, an `onnx.ModelProto` or an `onnx_ir.Model`.
        providers: `"cpu"`, `"cuda"` or ONNX Runtime's own names.
        kernels: `"native"` has qcompile's operators computed by the library of kernels, `"portable"` by their ONNX
            bodies; `"auto"` is native where the session runs on the CPU and there is a library.
        accuracy_level: what ONNX Runtime may do in 4-bit products of portable bodies: 0 exact, 4 int8 activations.
        threads: of the session; all cores by default.
    """
    with on_disk(model) as path:  # ONNX Runtime needs no file behind a session
        return sessions.session(
            path, providers=providers, kernels=kernels, accuracy_level=accuracy_level, threads=threads
        )


@door
def generate(
    model: Model,
    prompt: str,
    *,
    raw: bool = False,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    tokenizer: PathLike | None = None,
    on_text: Callable[[str], object] | None = None,
    accuracy_level: int = 0,
    provider: str = "cpu",
    kernels: str = "auto",
) -> str:
    """What a decoder says to a prompt; as `qcompile generate`.

    Args:
        model: a decoder, in every form that `session` takes.
        prompt: a question, for an instruct model whose chat template lies beside its tokenizer; else a text to go on
            with.
        raw: go on with the text, without the template.
        max_tokens: at most so many new tokens.
        temperature: 0 takes the most likely token.
        top_p: draw from the likeliest tokens only.
        seed: of the draws.
        tokenizer: a folder with `tokenizer.json`, by default beside the model.
        on_text: called with each piece of the text as it comes.
        accuracy_level: as in `session`.
        provider: `"cpu"` or `"cuda"`.
        kernels: as in `session`.

    Returns:
        The new text, without the prompt.
    """
    with on_disk(model) as path:
        subject = Subject(path, accuracy_level=accuracy_level, provider=provider, kernels=kernels)
        own = load_tokenizer(Path(tokenizer) if tokenizer is not None else path)
        sampling = Sampling(temperature, top_p, seed)
        pieces = []
        for piece in answer(subject, own, prompt, sampling, count=max_tokens, raw=raw).pieces:
            pieces.append(piece)
            if on_text is not None:
                on_text(piece)
    return "".join(pieces)
