"""Peak memory of a compile against the number of calibration batches: it must not grow with them.

Each compile runs in a process of its own; the peak is what the system counted for it (largest resident memory).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

DEFAULT = (8, 32, 128, 256)


def main() -> None:
    """Compile once for each number of batches and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="Other options go to qcompile.", allow_abbrev=False)
    parser.add_argument("model", type=Path, metavar="MODEL.onnx", help="the float model, a tokenizer.json beside it")
    parser.add_argument("--batches", type=int, nargs="+", default=DEFAULT, help="default: 8 32 128 256")
    parser.add_argument("--passes", default="smooth,pack", help="default: smooth,pack")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args, options = parser.parse_known_args()
    rows = []
    print(f"{'asked':>6} {'peak MB':>9} {'seconds':>8}  data")
    for count in args.batches:
        report = compiled(args.model, "--samples", str(count), "--passes", args.passes, *options)
        row = {"batches": count, "peak_bytes": report["peak_memory"], "seconds": report["seconds"]}
        rows.append(row | {"data": report["data"]})
        print(f"{count:6} {row['peak_bytes'] / 1e6:9.0f} {row['seconds']:8.0f}  {report['data']}", flush=True)
    peaks = [row["peak_bytes"] for row in rows]
    print(f"{(max(peaks) - min(peaks)) / 1e6:.0f} MB between the smallest and the largest peak")
    if args.json is not None:
        args.json.write_text(json.dumps({"model": str(args.model), "options": options, "rows": rows}, indent=2))


def compiled(model: Path, *options: str) -> dict[str, object]:
    """The report of a compile into a folder that is then removed."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "model.onnx"
        words = [sys.executable, "-m", "qcompile.compiler.cli", str(model), "-o", str(output), *options]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        report: dict[str, object] = json.loads(output.with_suffix(".report.json").read_text())
        return report


if __name__ == "__main__":
    main()
