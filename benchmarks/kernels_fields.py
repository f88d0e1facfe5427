"""Products of int2, int3, int5, int6 and pairs beside int4's, in turns in one process, without ONNX Runtime.

    python benchmarks/kernels_fields.py build/kernels/libqcompile_kernels.so --kernel avx512vnni --rows 1 --bits 8

Weights are random and asymmetric, with float16 scales; as many copies of each are multiplied in turn as fill 160 MB, so
that few rows read them from memory. A row of the table: bytes a weight, the shortest time, and that over int4's.
"""

import argparse
import ctypes
import time

import numpy as np

WORDS = ("Int4", "Int2", "Int3", "Int5", "Int6", "Int8", "Pairs64", "Pairs256")


def loaded(path: str) -> ctypes.CDLL:
    """The library with the types of what is called (c_api.h)."""
    library = ctypes.CDLL(path)
    size, pointer, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    library.qcompile_weight_create.restype = pointer
    library.qcompile_weight_create.argtypes = [
        ctypes.c_char_p, size, size, size, ctypes.c_char_p, number, pointer, pointer, number, pointer,
    ]  # fmt: skip
    library.qcompile_weight_bytes.restype, library.qcompile_weight_bytes.argtypes = size, [pointer]
    library.qcompile_weight_multiply.argtypes = [pointer, pointer, number, size, pointer, pointer, number]
    return library


def weights(library: ctypes.CDLL, word: str, args: argparse.Namespace) -> list[int]:
    """Copies of a random weight."""
    rng, pairs = np.random.default_rng(0), word.startswith("Pairs")
    bits = np.log2(int(word[5:])) / 2 if pairs else int(word[3:])
    group = args.k if pairs else args.group
    groups = args.k // group
    codes = rng.integers(0, 256, int(args.k * args.n * bits) // 8, dtype=np.uint8)
    points = rng.integers(0, 256, (groups + 8) * args.n, dtype=np.uint8)
    scale = (rng.random((groups, args.n)) * 0.01 + 0.01).astype(np.float16)
    given = (args.kernel.encode(), args.k, args.n, group, word.encode(), 0, codes.ctypes.data, scale.ctypes.data)
    copies = max(1, int(160e6 / codes.size)) if args.rows < 64 else 1
    zeros = None if pairs else points.ctypes.data
    return [library.qcompile_weight_create(*given, 1, zeros) for _ in range(copies)]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("library")
    parser.add_argument("--kernel", default="avx512vnni")
    parser.add_argument("--seconds", type=float, default=10)
    for name, standard in (("k", 4096), ("n", 4096), ("group", 128), ("rows", 1), ("bits", 8)):
        parser.add_argument(f"--{name}", type=int, default=standard)
    args = parser.parse_args()
    library = loaded(args.library)
    made = {word: weights(library, word, args) for word in WORDS}
    x = np.random.default_rng(1).standard_normal((args.rows, args.k)).astype(np.float32)
    y, best, end = np.empty((args.rows, args.n), np.float32), dict.fromkeys(WORDS, np.inf), time.time() + args.seconds
    turn = 0
    while time.time() < end:
        turn += 1
        for word, copies in made.items():
            own = copies[turn % len(copies)]
            start = time.perf_counter()
            library.qcompile_weight_multiply(own, x.ctypes.data, 0, args.rows, y.ctypes.data, None, args.bits)
            best[word] = min(best[word], time.perf_counter() - start)
    for word, copies in made.items():
        size = library.qcompile_weight_bytes(copies[0]) / args.k / args.n
        print(f"| {word} | {size:.3f} | {best[word] * 1e6:.0f} µs | {best[word] / best['Int4']:.3f} |")


if __name__ == "__main__":
    main()
