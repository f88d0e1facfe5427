"""Small GGUF files: matrices of any type, of random blocks; every bit pattern that a block may have, but no NaN."""

from pathlib import Path

import gguf
import numpy as np

from qcompile.models.gguf_blocks import KINDS

# Where blocks have their float16 numbers.
_HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "MXFP4": (),
}  # fmt: skip


def blocks(kind: str, n: int, k: int, *, seed: int = 0, spread: int = 2) -> np.ndarray:
    """Rows (n, bytes) of k numbers each. spread: scales lie within so many powers of two to both sides of 2^-8."""
    own, rng = KINDS[kind], np.random.default_rng(seed)
    raw = rng.integers(0, 256, (n * k // own.block, own.size), np.uint8)
    for place in _HALVES[kind]:
        halves = rng.uniform(-1, 1, len(raw)) * 2.0 ** rng.integers(-8 - spread, -8 + spread + 1, len(raw))
        raw[:, place : place + 2] = halves.astype("<f2").view(np.uint8).reshape(-1, 2)
    if kind == "MXFP4":
        raw[:, 0] = rng.integers(110, 130, len(raw))
    return raw.reshape(n, -1)


def numbers(kind: str, raw: np.ndarray) -> np.ndarray:
    """What gguf-py makes of rows of blocks, float32 (n, k)."""
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])


def write(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    """A file of matrices: (type, rows of blocks) by name, or ("F32" or "F16", numbers)."""
    writer = gguf.GGUFWriter(str(path), "llama")
    for name, (kind, data) in tensors.items():
        plain = data.dtype != np.uint8
        writer.add_tensor(name, data, raw_dtype=None if plain else gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
