"""The fastest formats within a bound against uniform ones: tokens a second and KL of SmolLM2-135M, say.

python benchmarks/fastest.py MODEL_FOLDER -o OUT [--passes pack] [--max-kl 0.15] [--threads 1]

Every model is compiled once, and compared with the float one on both texts of benchmarks/text. Then all decode in
turns. `fastest.json` has all rows; what is there already is not made again, but for the speeds.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import qcompile
from qcompile.compiler.api.bench import Candidate, bench_models
from qcompile.compiler.console.terminal import Bar
from qcompile.compiler.measure.workload import Workload

TEXT = sorted((Path(__file__).parent / "text").glob("eval-*.txt"))


def main() -> None:
    """Compile, score, and time; print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model", type=Path, help="folder of an exported decoder, with its tokenizer")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--passes", default="pack")
    parser.add_argument("--scale-bits", type=int, default=16)
    parser.add_argument("--max-kl", type=float, default=0.15)
    parser.add_argument("--tokens", type=int, default=511, help="of each text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    kept = args.output / "fastest.json"
    rows: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    with Bar() as bar:
        for name, settings in _settings(args.max_kl).items():
            if name in rows:
                continue
            rows[name] = _row(args, name, settings, bar)
            kept.write_text(json.dumps(rows, indent=1) + "\n")
    models = [Candidate(name, _file(args, name), "auto", 0) for name in rows]
    found = bench_models(models, Workload(prompts=(1,), decode=32), threads=[args.threads], rounds=args.rounds)
    for one in found.records():
        rows[one["label"]][one["name"]] = one["value"]
    kept.write_text(json.dumps(rows, indent=1) + "\n")
    print(found)
    for name, row in rows.items():
        print(f"| {name} | {row['size'] / 1e6:.1f} | {' / '.join(f'{own:.3g}' for own in row['kl'])} |")


def _settings(bound: float) -> dict[str, dict[str, Any]]:
    """What is compared: by a name, settings beside the list of passes."""
    uniform = {"weights": "int4(group=64)"}
    return {
        "int4-g64": uniform,
        "fastest": {"max_kl": bound, "fastest": True},
        "int4-g64-all": uniform | {"lm_head": "int4(group=64)", "embedding": "int4(group=64)"},
        "smallest": {"max_kl": bound},
    }


def _row(args: argparse.Namespace, name: str, settings: dict[str, Any], bar: Bar) -> dict[str, Any]:
    """Size, KL of both texts, and the choice in words, of one model."""
    source = args.model / "model.onnx"
    report = qcompile.compile(
        source, args.passes, output=_file(args, name), scale_bits=args.scale_bits, verify="sample", progress=bar,
        tokenizer=args.model, **settings,
    )  # fmt: skip
    scored = qcompile.evaluate(
        report.output, against=source, text=TEXT, tokens=args.tokens, tokenizer=args.model
    )  # fmt: skip
    kl = [float(one["kl"]) for one in scored.records() if one["kl"] is not None][: len(TEXT)]
    print(name, report.compiled_bytes, kl, report.target[:1], flush=True)
    return {"size": report.compiled_bytes, "kl": kl, "told": report.target[:1]}


def _file(args: argparse.Namespace, name: str) -> Path:
    return Path(args.output) / f"{name}.onnx"


if __name__ == "__main__":
    main()
