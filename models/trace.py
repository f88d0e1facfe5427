"""A torch module into an ONNX graph: wrappers with plain tensors in and out, dynamic batch and sequence."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from qcompile.models import hf
from qcompile.passes.errors import UserError

OPSET = 21
# The newest IR version that ONNX Runtime 1.24 and older tools read is higher; nothing in these graphs needs more.
IR_VERSION = 10

Arrays = dict[str, npt.NDArray[Any]]
Dims = tuple[str | int | None, ...]


@dataclass(frozen=True)
class Signature:
    """Names and symbolic dimensions of a graph's inputs and outputs.

    Dimensions are names, fixed numbers, or None for those that the exporter knows. With a cache of L layers the
    last 2 L inputs are past_key_values.{i}.key / .value and the last 2 L outputs present.{i}.key / .value; the decoder
    behind an encoder has `a_layer` 4 of them. listed_all: the module takes all its inputs as one list, not the
    caches alone.
    """

    inputs: dict[str, Dims]
    outputs: dict[str, Dims]
    cache_layers: int = 0
    a_layer: int = 2
    listed_all: bool = False

    @property
    def listed(self) -> int:
        """How many of the inputs, the last ones, the module takes as one list."""
        return len(self.inputs) if self.listed_all else self.a_layer * self.cache_layers


def decoder_signature(layers: int, *, kv_cache: bool, last_row: bool = False) -> Signature:
    """input_ids, attention_mask (and position_ids, past) to logits (and present); last_row: see `score_last_row`."""
    tokens, logits = ("batch", "sequence"), ("batch", 1 if last_row else "sequence", None)
    if not kv_cache:
        return Signature({"input_ids": tokens, "attention_mask": tokens}, {"logits": logits})
    parts = [f"{i}.{part}" for i in range(layers) for part in ("key", "value")]
    inputs: dict[str, Dims] = {
        "input_ids": tokens,
        "attention_mask": ("batch", "total_sequence"),
        "position_ids": tokens,
    }
    past: dict[str, Dims] = {f"past_key_values.{part}": ("batch", None, "past_sequence", None) for part in parts}
    present: dict[str, Dims] = {f"present.{part}": ("batch", None, "total_sequence", None) for part in parts}
    return Signature(inputs | past, {"logits": logits, **present}, layers)


def encoder_signature(*, token_types: bool, pooler: bool) -> Signature:
    """input_ids, attention_mask (and token_type_ids) to last_hidden_state (and pooler_output)."""
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if token_types else [])
    outputs: dict[str, Dims] = {"last_hidden_state": ("batch", "sequence", None)}
    if pooler:
        outputs["pooler_output"] = ("batch", None)
    return Signature(dict.fromkeys(names, ("batch", "sequence")), outputs)


def signature_of(model: Any, *, decoder: bool, kv_cache: bool, last_row: bool = False) -> Signature:
    """The signature that a transformers model is exported with."""
    config = model.config
    if decoder:
        return decoder_signature(int(config.num_hidden_layers), kv_cache=kv_cache, last_row=last_row)
    if kv_cache:
        raise UserError(f"{config.model_type} is an encoder: it has no KV cache")
    token_types = int(getattr(config, "type_vocab_size", 0) or 0) > 1
    return encoder_signature(token_types=token_types, pooler=getattr(model, "pooler", None) is not None)


def wrap(model: Any, signature: Signature, *, decoder: bool) -> Any:
    """A torch module whose forward takes the signature's inputs and returns its outputs, as plain tensors."""
    import torch
    from transformers import DynamicCache

    class Decoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.m = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.m(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    class CachedDecoder(Decoder):
        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, past: Any) -> Any:  # type: ignore[override]
            pairs = list(zip(past[0::2], past[1::2], strict=True))
            cache = DynamicCache(pairs)
            out = self.m(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
            return (out.logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))

    class Encoder(Decoder):
        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None) -> Any:
            types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
            out = self.m(input_ids=input_ids, attention_mask=attention_mask, **types)
            return tuple(out[name] for name in signature.outputs)

    module = (CachedDecoder if signature.cache_layers else Decoder) if decoder else Encoder
    return module().eval()


def score_last_row(model: Any) -> None:
    """Have a decoder's head compute the last row (batch, 1, V) of each sequence only: the last one of a run that is no
    padding. Batches may be padded on the left, as transformers does, or on the right, as onnxruntime-genai does.
    """
    import torch

    masks: list[Any] = [None]

    def keep_mask(module: Any, given: Any, named: dict[str, Any]) -> None:
        masks[0] = named.get("attention_mask")

    def keep_row(module: Any, given: Any) -> Any:
        hidden, mask = given[0], masks[0]
        if mask is None:
            return (hidden[:, -1:], *given[1:])
        rows = hidden.shape[1]
        seen = mask[:, mask.shape[1] - rows :].ne(0).to(torch.int64)
        last = (seen * torch.arange(rows)).argmax(1)
        return (hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[2])), *given[1:])

    head = model.get_output_embeddings()
    if head is not None:
        model.register_forward_pre_hook(keep_mask, with_kwargs=True)
        head.register_forward_pre_hook(keep_row)
    with torch.no_grad():
        rows = model(input_ids=torch.zeros((1, 2), dtype=torch.int64)).logits.shape[1]
    if rows != 1:
        raise UserError(f"the head of {model.config.model_type} is no layer of its own: export it with --logits all")


def to_onnx(module: Any, signature: Signature, examples: Sequence[Any]) -> ir.Model:
    """The exported graph, still holding torch's weights. `examples` are the inputs in the signature's order."""
    import torch

    dynamic = torch.export.Dim.DYNAMIC
    shapes = [{i: dynamic for i, dim in enumerate(dims) if isinstance(dim, str)} for dims in signature.inputs.values()]
    plain = len(shapes) - signature.listed
    arguments: tuple[Any, ...] = tuple(examples[:plain])
    dims: tuple[Any, ...] = tuple(shapes[:plain])
    if signature.listed:
        arguments, dims = (*arguments, list(examples[plain:])), (*dims, shapes[plain:])
    try:
        with hf.quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                arguments,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=dims,
                input_names=list(signature.inputs),
                output_names=list(signature.outputs),
                verbose=False,
            )
    except Exception as error:
        raise UserError(f"torch.onnx.export cannot translate the model: {_reason(error)}") from error
    exported: ir.Model = program.model
    exported.ir_version = IR_VERSION
    return exported


def _reason(error: BaseException) -> str:
    """What went wrong at the bottom: torch wraps it in advice on how to report it."""
    while error.__cause__ is not None:
        error = error.__cause__
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    fixed = re.search(r"inferred a static shape of (\d+) for dimension inputs\['(\w+)'\].*?\.shape\[(\d+)\]", plain)
    if fixed:
        return (
            f"its layers go through the data step by step, so that the graph would hold for one size only (dimension "
            f"{fixed[3]} of {fixed[2]} came out as {fixed[1]})"
        )
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:300]}" if lines else type(error).__name__


def empty_past(model: Any, signature: Signature) -> dict[str, npt.NDArray[Any]]:
    """Past keys and values of length 0, (2, kv_heads, 0, head_dim), as the model itself shapes its cache."""
    if not signature.cache_layers:
        return {}
    import torch

    with hf.quiet(), torch.no_grad():  # transformers remarks on its own interfaces
        layers = model(input_ids=torch.zeros((2, 2), dtype=torch.int64), use_cache=True).past_key_values.layers
    if any(getattr(layer, "keys", None) is None for layer in layers) or len(layers) != signature.cache_layers:
        raise UserError(f"{model.config.model_type} has a cache of its own kind: export it with --no-kv-cache")
    tensors = (tensor[:, :, :0].numpy() for layer in layers for tensor in (layer.keys, layer.values))
    return dict(zip(list(signature.inputs)[-2 * len(layers) :], tensors, strict=True))


def takes_caches(model: Any) -> bool:
    """Whether a decoder's caches can be inputs and outputs; some have caches of a kind of their own."""
    try:
        empty_past(model, signature_of(model, decoder=True, kv_cache=True))
    except UserError:
        return False
    return True


def examples(feeds: dict[str, npt.NDArray[Any]], signature: Signature) -> list[Any]:
    """Inputs to trace with: 7 tokens after a past of 5, sizes that no other dimension has by rule."""
    import torch

    tokens, past = 7, 5 if signature.cache_layers else 0
    found = []
    for name, dims in signature.inputs.items():
        array = feeds[name]
        sizes = [{"batch": 2, "sequence": tokens, "past_sequence": past}.get(str(d), tokens + past) for d in dims]
        if len(dims) == 4:
            sizes[1], sizes[3] = array.shape[1], array.shape[3]
            found.append(torch.zeros(sizes, dtype=torch.from_numpy(array).dtype))
        else:
            found.append(torch.ones(sizes, dtype=torch.int64))
    return found
