"""qcompile's own 4-bit models on the terms of peers.py: head and embedding in float, so that only the linears count.

    python benchmarks/accuracy.py MODEL.onnx -o OUT [--settings g64-asym,g64-sym,g128-asym,g128-sym,nf4,mxfp4]
    python benchmarks/accuracy.py MODEL.onnx -o OUT --scale-bits 16 --lists smooth,awq,rotate,gptq,pack \
        --settings "int4(group=64),int5(group=64),int3(group=32,symmetric=true),pairs3.5,4.31bpw"

Compiles MODEL.onnx (a float decoder, tokenizer.json beside it) by every pass list at every setting, scores all of them
with `qcompile eval` on benchmarks/text, and prints a Markdown table. What is already compiled is not made again. A
setting is int4's group size and symmetry, a weight format as --weights takes it, or a budget in bits a weight.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

TEXTS = sorted((Path(__file__).parent / "text").glob("eval-*.txt"))
SETTINGS = "g64-asym,g64-sym,g128-asym,g128-sym"
LISTS = ("awq,pack", "smooth,awq,gptq,pack")
_BETWEEN = re.compile(r",(?![^(]*\))")  # not those in parentheses


def main() -> None:
    """Compile, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--settings", default=SETTINGS)
    parser.add_argument("--lists", nargs="+", default=LISTS)
    parser.add_argument("--scale-bits", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=4096, help="evaluated tokens of each text")
    args = parser.parse_args()
    rows = {}
    for setting in _BETWEEN.split(args.settings):
        stored = [*options(setting), "--scale-bits", args.scale_bits]
        for passes in args.lists:
            target = args.output / setting / passes.replace(",", "-") / "model.onnx"
            rows[target] = (setting, passes)
            if not target.exists():
                kept = ["--lm-head", "keep", "--embedding", "keep"]
                qcompile(args.model, "--passes", passes, *stored, *kept, "-o", target)
    scores = args.output / "scores.json"
    against = ["--against", args.model, "--tokenizer", args.model.parent]
    texts = ["--text", *TEXTS, "--tokens", args.tokens]
    qcompile("eval", *rows, *against, "--kernels", "portable", *texts, "--json", scores)
    print_table(rows, json.loads(scores.read_text(encoding="utf-8")))


def options(setting: str) -> list[str]:
    """What `qcompile` is given for a setting."""
    if match := re.fullmatch(r"g(\d+)-(asym|sym)", setting):
        return ["--group-size", match[1], f"--{match[2]}metric"]
    return ["--budget" if setting.endswith("bpw") else "--weights", setting]


def print_table(rows: dict[Path, tuple[str, str]], scores: list[dict[str, object]]) -> None:
    """One Markdown row a model: KL and top-1 agreement of each text, and their means."""
    names = " | ".join(f"KL {text.stem} | top-1 % {text.stem}" for text in TEXTS)
    print(f"\n| setting | passes | bits | {names} | mean KL | mean top-1 % | s | peak GB |")
    print("|---|---|---|" + "---|" * (2 * len(TEXTS) + 4))
    for target, (setting, passes) in rows.items():
        own = [score for score in scores if Path(str(score["model"])) == target and score["text"] != "all texts"]
        divergences = [float(str(score["kl"])) for score in own]
        agreements = [100 * float(str(score["agreement"])) for score in own]
        cells = [f"{kl:.4f} | {top:.1f}" for kl, top in zip(divergences, agreements, strict=True)]
        report = json.loads(target.with_name("model.report.json").read_text(encoding="utf-8"))
        means = f"{sum(divergences) / len(own):.4f} | {sum(agreements) / len(own):.1f}"
        bits = f"{report['bits_per_weight']:.2f}"
        print(f"| {setting} | {passes} | {bits} | {' | '.join(cells)} | **{means.replace(' | ', '** | ')} | "
              f"{report['seconds']:.0f} | {report['peak_memory'] / 1e9:.2f} |")  # fmt: skip


def qcompile(*arguments: object) -> None:
    """Run a qcompile command, shown first."""
    words = [str(argument) for argument in arguments]
    print("$ qcompile", *words, flush=True)
    subprocess.run([sys.executable, "-m", "qcompile.compiler.cli", *words], check=True)


if __name__ == "__main__":
    main()
