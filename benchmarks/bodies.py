"""Time and memory to load portable models in plain ONNX Runtime, by weight format: what bodies cost that it folds.

    python benchmarks/bodies.py [--formats int4 int3 …] [--rounds 3] [--json OUT.json]

A decoder of 0.5 B random, heavy-tailed weights (scale_models.py; the sizes of Qwen2.5-0.5B, head and table tied) is
packed by `pack` in each format, head and table too. Then sessions are made without the library, each in a process of
its own, the formats by turns. Seconds and peaks are of making the session, without those of the process before it; the
peak is of resident memory, with the pages of the file. Models are kept in --cache.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from scale import CACHE
from scale_models import Shape, decoder, made

FORMATS = ("int4", "int3", "int2", "int5", "int6", "pairs3", "nvfp4")
HALF_A_BILLION = Shape(896, 4864, 14, 2, 151936, tied=True, layers=24)
_CHILD = """
import json, resource, sys, time
import numpy, onnxruntime
def peak(): return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = int(sys.argv[2]), 3
before, cpu, wall = peak(), time.process_time(), time.perf_counter()
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
told = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "peak": peak() - before}
began = time.perf_counter()
session.run(None, {"input_ids": numpy.arange(16)[None]})
print(json.dumps({**told, "run": time.perf_counter() - began, "running": peak() - before}))
"""


def main() -> None:
    """A Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=FORMATS, help="the first is what others are compared with")
    parser.add_argument("--layers", type=int, default=HALF_A_BILLION.layers)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where models are kept")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args()
    shape = Shape(**{**vars(HALF_A_BILLION), "layers": args.layers})
    files = {name: packed(shape, name, args.cache) for name in args.formats}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in files}
    for _ in range(args.rounds):
        for name, file in files.items():
            words = [sys.executable, "-c", _CHILD, str(file), str(args.threads)]
            runs[name].append(json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout))
    rows = {name: {key: statistics.median(run[key] for run in own) for key in own[0]} for name, own in runs.items()}
    first = rows[args.formats[0]]
    print(f"{shape.weights / 1e9:.2f} B weights, medians of {args.rounds}, beside {args.formats[0]} in brackets\n")
    print("| format | file MB | load CPU s | wall s | peak MB | 16 tokens s |\n|---|---:|---:|---:|---:|---:|")
    for name, row in rows.items():
        size = sum(own.stat().st_size for own in files[name].parent.glob("model*") if own.suffix in (".onnx", ".data"))
        row["file"] = size
        times = [f"{row[key]:.2f} ({row[key] / first[key]:.1f})" for key in ("cpu", "wall")]
        peak = f"{row['peak'] / 1e6:.0f} ({row['peak'] / first['peak']:.1f})"
        print(f"| {name} | {size / 1e6:.0f} | {times[0]} | {times[1]} | {peak} | {row['run']:.2f} |")
    if args.json is not None:
        args.json.write_text(json.dumps({"shape": vars(shape), "rows": rows, "runs": runs}, indent=2))


def packed(shape: Shape, name: str, cache: Path) -> Path:
    """The decoder in a weight format. A change of the compiler is not noticed: remove the folder then."""
    source = decoder(shape, cache)

    def write(folder: Path) -> None:
        words = [sys.executable, "-m", "qcompile", str(source), "-o", str(folder / "model.onnx"), "--passes", "pack"]
        words += ["--weights", name, "--lm-head", name, "--embedding", name, "--min-cosine", "0", "--verify", "sample"]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    return made(cache / f"{source.parent.name}-{name}", write) / "model.onnx"


if __name__ == "__main__":
    main()
