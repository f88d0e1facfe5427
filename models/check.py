"""An exported graph against the torch module it came from, on a real prompt."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.models.trace import Arrays, Signature
from qcompile.passes.errors import UserError

# Opens a model file; what comes back runs it: inputs by name to outputs by name.
OpenModel = Callable[[Path], Callable[[Arrays], Arrays]]

PROMPT = "The old lighthouse keeper climbed the stairs every evening, lit the lamp, and wrote down the weather: "
_TOLERANCE = {"fp32": 1e-3, "fp16": 3e-2}


@dataclass(frozen=True)
class Checked:
    """What the check found. max_relative_error is the worst, over outputs, of max |a - b| / max |b|."""

    prompt: str
    tokens: int
    steps: Sequence[str]
    max_abs_error: float
    max_relative_error: float
    worst_output: str
    tolerance: float

    def as_dict(self) -> dict[str, Any]:
        """For export.json."""
        return asdict(self)


def prompt_ids(folder: Path, vocab: int) -> tuple[str, npt.NDArray[np.int64]]:
    """The prompt and its token ids (tokens,); without a usable tokenizer, seeded random ids."""
    path = folder / "tokenizer.json"
    if path.is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        ids = tokenizer.encode(PROMPT).ids
        if len(ids) >= 4 and max(ids) < vocab:
            return PROMPT, np.array(ids[:64], np.int64)
    return "(no tokenizer: random ids)", np.random.default_rng(0).integers(0, vocab, 20)


def batch(ids: npt.NDArray[np.int64], signature: Signature) -> Arrays:
    """Two rows: the prompt, and the prompt reversed with its last third masked as padding. All (2, tokens)."""
    feeds: Arrays = {"input_ids": np.stack([ids, ids[::-1]]), "attention_mask": np.ones((2, len(ids)), np.int64)}
    feeds["attention_mask"][1, -(len(ids) // 3) :] = 0
    if "position_ids" in signature.inputs:
        feeds["position_ids"] = np.tile(np.arange(len(ids)), (2, 1))
    if "token_type_ids" in signature.inputs:
        feeds["token_type_ids"] = np.zeros_like(feeds["input_ids"])
        feeds["token_type_ids"][:, len(ids) // 2 :] = 1
    return feeds


def next_step(feeds: Arrays, outputs: Arrays) -> Arrays:
    """The decode step after `feeds`: the likeliest token of each row, and the cache that came out."""
    mask = feeds["attention_mask"]
    presents = {name: array for name, array in outputs.items() if name.startswith("present.")}
    return {
        "input_ids": outputs["logits"][:, -1:].argmax(-1).astype(np.int64),
        "attention_mask": np.concatenate([mask, np.ones((2, 1), np.int64)], axis=1),
        "position_ids": mask.sum(1, keepdims=True),
    } | {name.replace("present.", "past_key_values.", 1): array for name, array in presents.items()}


def compare(
    module: Any, path: Path, signature: Signature, first: Arrays, prompt: str, *, open_model: OpenModel, dtype: str
) -> Checked:
    """Run both, on the prompt and, with a cache, on one decode step; disagreement is a UserError."""
    steps = {"prompt": first}
    if signature.cache_layers:
        steps["decode"] = next_step(first, run_torch(module, signature, first))
    return compare_on(module, path, signature, steps, prompt, open_model=open_model, dtype=dtype)


def compare_on(
    module: Any,
    path: Path,
    signature: Signature,
    steps: Mapping[str, Arrays],
    prompt: str,
    *,
    open_model: OpenModel,
    dtype: str,
) -> Checked:
    """Run both on the inputs of every step; disagreement is a UserError."""
    run, errors = open_model(path), list[tuple[float, float, str]]()
    for step, feeds in steps.items():
        errors += _errors(step, run(feeds), run_torch(module, signature, feeds))
    relative, _, worst = max(errors)
    tolerance = _TOLERANCE[dtype]
    if not relative <= tolerance:
        raise UserError(
            f"the exported graph disagrees with torch: relative error {relative:.2g} at {worst}, "
            f"{tolerance:.0e} is allowed; nothing was written"
        )
    largest = max(absolute for _, absolute, name in errors if not name.endswith((".key", ".value")))
    ids = next(iter(steps.values())).get("input_ids")
    tokens = 0 if ids is None else int(ids.shape[1])
    return Checked(prompt, tokens, list(steps), largest, relative, worst, tolerance)


def run_torch(module: Any, signature: Signature, feeds: Arrays) -> Arrays:
    """The module's outputs by name, as float32."""
    import torch

    tensors = [torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in signature.inputs if name in feeds]
    plain = len(signature.inputs) - signature.listed
    arguments = [*tensors[:plain], tensors[plain:]] if signature.listed else tensors
    with torch.no_grad():
        out = module(*arguments)
    outputs = out if isinstance(out, tuple) else (out,)
    return {name: tensor.numpy() for name, tensor in zip(signature.outputs, outputs, strict=True)}


def _errors(step: str, found: Arrays, expected: Arrays) -> list[tuple[float, float, str]]:
    """(relative, absolute, where) of every output; NaN and wrong shapes count as infinite."""
    errors = []
    for name, wanted in expected.items():
        label = f"{step}:{name}"
        if found[name].shape != wanted.shape:
            raise UserError(f"the exported graph gives {label} the shape {found[name].shape}, torch {wanted.shape}")
        reference = wanted.astype(np.float32)
        absolute = float(np.abs(found[name].astype(np.float32) - reference).max(initial=0.0))
        scale = float(np.abs(reference).max(initial=0.0)) or 1.0
        finite = np.isfinite(absolute) and np.isfinite(scale)
        errors.append((absolute / scale, absolute, label) if finite else (np.inf, np.inf, label))
    return errors
