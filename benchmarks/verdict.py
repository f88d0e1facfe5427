"""The verdict on several compiled files of one decoder, and whether a gate finds a planted fault that perplexity hides.

    python benchmarks/verdict.py FLOAT.onnx -o OUT default=small/model.onnx pack=pack/model.onnx int3=int3/model.onnx

Scores every file against the float model on the evaluation texts and on all task sets (docs/verdict.md). Then the
scales of one product of the first file are multiplied by --factor, one product at a time, in copies of it, and each
copy is judged twice: against the float model, by bounds a few percent above what the sound file has on the same tokens
(--margin), and against the sound file, as CI judges a build by the last one. Prints Markdown.
"""

import argparse
import json
from pathlib import Path

import onnx

import qcompile

TEXTS = sorted((Path(__file__).parent / "text").glob("eval-*.txt"))
PRODUCTS = (
    "model.layers.10.mlp.down_proj",
    "model.layers.20.mlp.gate_proj",
    "model.layers.5.self_attn.v_proj",
    "model.layers.10.self_attn.o_proj",
    "model.layers.10.self_attn.q_proj",
)
# The gate of a build against the last one: the same recipe ought to give the same numbers.
BUILD = {"perplexity_ratio": {"min": 0.98, "max": 1.02}, "flips": {"max": 0.01}, "kl": {"max": 0.001}}


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the float decoder, tokenizer.json beside it")
    parser.add_argument("compiled", nargs="+", help="NAME=MODEL.onnx, the one that is broken on purpose first")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of broken copies and verdict.json")
    parser.add_argument("--tokens", type=int, default=4096, help="of each text (default 4096)")
    parser.add_argument("--tasks", default="all", help="names of tasks, with commas (default all)")
    parser.add_argument("--task-items", type=int, default=100, help="of each task (default 100)")
    parser.add_argument("--factor", type=float, default=1.2, help="on the scales of a product (default 1.2)")
    parser.add_argument(
        "--margin", type=float, default=1.05, help="of bounds, on the sound file's figures (default 1.05)"
    )
    parser.add_argument("--products", nargs="*", default=PRODUCTS, help="names of nodes whose scales are broken")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    models = {name: Path(path) for name, _, path in (word.partition("=") for word in args.compiled)}
    told = {"tokens": args.tokens}
    verdict = qcompile.compare(
        models, args.model, text=TEXTS, tasks=args.tasks, task_items=args.task_items, tokens=args.tokens
    )
    print_models(verdict)
    sound = next(iter(models.values()))
    faults = judge_faults(args, sound)
    told |= {"verdict": verdict.to_dict(), "faults": faults}
    (args.output / "verdict.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def print_models(verdict: qcompile.Evaluation) -> None:
    """A line for each model over all texts, and one for each task and model."""
    print("| model | MB | perplexity | ratio to float | KL p50 | mean | p99 | flips | lost | won | accuracy drop |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in verdict.records():
        if row["text"] == "all texts":
            print(f"| {named(row)} | {row['file_bytes'] / 1e6:.1f} | {row['perplexity']:.2f} | {changed(row)} |")
    print("\n| task | model | accuracy | lost | won | drop | McNemar's p |\n|---|---|---|---|---|---|---|")
    for row in verdict.to_dict()["tasks"]:
        accuracy = f"{row['accuracy']:.0%} [{row['accuracy_low']:.0%}, {row['accuracy_high']:.0%}]"
        more = " | | | "
        if "mcnemar_p" in row:
            drop = f"{row['accuracy_drop']:+.0%} [{row['accuracy_drop_low']:+.0%}, {row['accuracy_drop_high']:+.0%}]"
            more = f"{row['lost']} | {row['won']} | {drop} | {row['mcnemar_p']:.2g}"
        print(f"| {row['task']} | {named(row)} | {accuracy} | {more} |")


def named(row: dict) -> str:
    """The model, which is float where nothing is compared."""
    return str(row["model"]) if {"flips", "mcnemar_p"} & row.keys() else "float"


def changed(row: dict) -> str:
    """The cells of what changed against the float model; empty of that itself."""
    if "flips" not in row:
        return " | ".join([""] * 8)
    cells = [f"{row['perplexity_ratio']:.3f} [{row['perplexity_ratio_low']:.3f}, {row['perplexity_ratio_high']:.3f}]"]
    cells += [f"{row['kl_p50']:.3f}", f"{row['kl']:.4f} ± {row['kl_error']:.4f}", f"{row['kl_p99']:.2f}"]
    cells += [f"{row['flips']:.1%} [{row['flips_low']:.1%}, {row['flips_high']:.1%}]"]
    cells += [f"{row['flips_lost']:.2%}", f"{row['flips_won']:.2%}"]
    cells += [f"{row['accuracy_drop']:+.2%} [{row['accuracy_drop_low']:+.2%}, {row['accuracy_drop_high']:+.2%}]"]
    return " | ".join(cells)


def judge_faults(args: argparse.Namespace, sound: Path) -> list[dict]:
    """Broken copies of the sound file, judged against the float model and against the sound file itself."""
    broken = {name: plant(sound, args.output / name / "model.onnx", name, args.factor) for name in args.products}
    everything = {"sound": sound, **broken}
    settings = {"text": TEXTS, "tokens": args.tokens, "tokenizer": args.model.parent}
    by_float = qcompile.compare(everything, args.model, **settings)
    try:
        by_build = qcompile.compare(broken, sound, **settings, gate=BUILD)
    except qcompile.Verdict as error:
        by_build = error.document
    here = {
        (row["model"], row["text"]): row for row in by_float.records() if row["model"] in everything and "flips" in row
    }
    print("\n| file | perplexity | KL to float | perplexity > × margin | KL > × margin | KL to sound | build gate |")
    print("|---|---|---|---|---|---|---|")
    found = []
    for name in everything:
        rows = [(row, here["sound", text]) for (model, text), row in here.items() if model == name]
        over = {
            figure: sum(row[figure] > args.margin * known[figure] for row, known in rows)
            for figure in ("perplexity", "kl")
        }
        own = here[name, "all texts"]
        kept = [one for one in by_build.kept if one.model == name]
        kl = next((one.value for one in kept if one.bound.startswith("kl") and one.on == "all texts"), 0.0)
        names = sorted({one.bound for one in kept if not one.holds})
        told = "breaks " + ", ".join(f"`{bound}`" for bound in names) if names else "holds"
        print(f"| {name} | {own['perplexity']:.3f} | {own['kl']:.4f} | {over['perplexity']} of {len(rows)} | "
              f"{over['kl']} of {len(rows)} | {kl:.5f} | {told} |")  # fmt: skip
        found.append({"file": name, "over": over, "float": own, "kl_to_sound": kl, "broken": names})
    return found


def plant(source: Path, target: Path, product: str, factor: float) -> Path:
    """A copy of a compiled file whose node `product` has its scales multiplied."""
    model = onnx.load(source)
    node = next(node for node in model.graph.node if node.name == product)
    scales = [
        tensor for tensor in model.graph.initializer if tensor.name in node.input and tensor.name.endswith(".scale")
    ]
    if not scales:
        raise SystemExit(f"{product} has no scales of its own in {source}")
    for tensor in scales:
        array = onnx.numpy_helper.to_array(tensor)
        tensor.CopyFrom(onnx.numpy_helper.from_array((array * factor).astype(array.dtype), tensor.name))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.with_name("model.data").unlink(missing_ok=True)
    onnx.save(model, target, save_as_external_data=True, location="model.data")
    return target


if __name__ == "__main__":
    main()
