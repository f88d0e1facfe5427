"""`make demo`: the whole job on a real language model, by the commands a user would type.

Exports SmolLM2-135M, compiles it three ways at 4 bits, compares each with the float model on text that no calibration
has seen, and lets the best one write a sentence. Everything lands in --output; what is already there is not made again.
"""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

TEXT = Path(__file__).parent / "text"
LISTS = ("pack", "smooth,awq,pack", "smooth,awq,rotate,gptq,pack")
PROMPT = "The capital of France is"


def main() -> None:
    """Run all steps, each shown as the command it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder (default: demo-output)")
    parser.add_argument("--group-size", type=int, default=64, help="weights that share a scale (default: 64)")
    parser.add_argument("--tokens", type=int, default=4096, help="evaluated tokens of each text (default: 4096)")
    args = parser.parse_args()
    started = time.monotonic()
    source = args.output / "smollm2"
    model = source / "model.onnx"
    if not model.exists():
        qcompile("export", "smollm2-135m", "--no-kv-cache", "-o", source)
    compiled = []
    for passes in LISTS:
        target = args.output / passes.replace(",", "-") / "model.onnx"
        compiled.append(target)
        if not target.exists():
            qcompile(model, "--passes", passes, "--group-size", args.group_size, "-o", target)
    texts = sorted(TEXT.glob("eval-*.txt"))
    qcompile("eval", *compiled, "--against", model, "--text", *texts, "--tokenizer", source, "--tokens", args.tokens)
    qcompile("generate", compiled[-1], "--raw", "--prompt", PROMPT, "--tokenizer", source, "--max-tokens", 24)
    minutes = (time.monotonic() - started) / 60
    print(f"\nThe whole demo took {minutes:.1f} minutes. The model to keep: {compiled[-1]}")


def qcompile(*arguments: object) -> None:
    """Show a qcompile command, then run it."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ qcompile {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "qcompile.compiler.cli", *words], check=True)


if __name__ == "__main__":
    main()
