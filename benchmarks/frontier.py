"""Formats chosen by a budget against uniform settings and against random ones of equal bytes, by their true KL.

python benchmarks/frontier.py MODEL_FOLDER -o OUT [--passes pack] [--random 20] [--tokens 511] [--beside "NAME=OTHER"]

Every row is compiled, run, and compared with the float model on both texts of benchmarks/text. The frontier is measured
once, on windows of the bundled calibration text. `frontier.json` has all rows, `frontier.svg` the picture, with the
rows of another list of passes beside it; what is there already is not made again.
"""

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import qcompile
from qcompile.compiler.api.spending import Chooser
from qcompile.compiler.console.terminal import Bar
from qcompile.compiler.data.calibration import Calibration
from qcompile.compiler.sweep.budget.allocate import Option
from qcompile.compiler.sweep.budget.choose import Choice, Search

TEXT = sorted((Path(__file__).parent / "text").glob("eval-*.txt"))
UNIFORM = ("int3(group=64)", "int4(group=128)", "int4(group=64)", "int4(group=32)", "int5(group=64)", "int6(group=64)")


@dataclass(frozen=True)
class Row:
    """One compiled model. size: bytes of its files. kl: nats a token, of each text. foretold: on windows of another."""

    name: str
    size: int
    foretold: float
    kl: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the texts."""
        return sum(self.kl) / len(self.kl)


def main() -> None:
    """Measure all rows, and print them as a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model", type=Path, help="folder of an exported decoder, with its tokenizer")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--passes", default="pack")
    parser.add_argument("--scale-bits", type=int, default=16)
    parser.add_argument("--uniform", nargs="*", default=UNIFORM, help="formats for all weights")
    parser.add_argument("--random", type=int, default=20, help="draws of equal bytes")
    parser.add_argument("--size", type=float, help="bytes of weights of the draws (default: those of int4 g64)")
    parser.add_argument("--tokens", type=int, default=511, help="of each text")
    parser.add_argument("--samples", type=int, default=32, help="windows of 512 tokens that compiles calibrate on")
    parser.add_argument("--beside", metavar="NAME=OUT", action="append", default=[], help="rows for the picture alone")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    source, kept = args.model / "model.onnx", args.output / "frontier.json"
    recipe = qcompile.Recipe(passes=args.passes, scale_bits=args.scale_bits, budget="8bpw")
    with Bar() as bar:
        found = Chooser(source, recipe, Calibration(), bar)
    rows = read(kept) if kept.exists() else []
    for name, made in choices(found.search, args.uniform, args.random, args.size):
        if name in [row.name for row in rows]:
            continue
        target = args.output / "made.onnx"
        own = replace(found.search.recipe_of(made), min_coverage=0, samples=args.samples)
        report = qcompile.compile(source, recipe=own, output=target, verify="sample", tokenizer=args.model)
        scored = qcompile.evaluate(target, against=source, text=TEXT, tokens=args.tokens, tokenizer=args.model)
        kl = tuple(float(one["kl"]) for one in scored.records() if one["kl"] is not None)[: len(TEXT)]
        rows.append(Row(name, report.compiled_bytes, found.search.change(made), kl))
        kept.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        print(table(rows[-1:]), flush=True)
    print(table(rows))
    beside = {name: read(Path(out) / "frontier.json") for name, _, out in (own.partition("=") for own in args.beside)}
    draw({args.passes: rows, **beside}, args.output / "frontier.svg")


def read(path: Path) -> list[Row]:
    """What `frontier.json` has."""
    return [Row(**{**own, "kl": tuple(own["kl"])}) for own in json.loads(path.read_text())]


def choices(
    search: Search, uniform: Sequence[str], draws: int, size: float | None = None
) -> Iterator[tuple[str, Choice]]:
    """Uniform settings and the frontier's choices of as many bytes at most; random ones, by default of int4 g64's."""
    options = search.options
    for name in uniform:
        made = [next((own for own in unit if own.what == name), unit[0]) for unit in options]
        yield name, made
        if (best := search.of_bytes(sum(own.size for own in made))) is not None:
            yield f"frontier at {name}", best
    size = size or sum(next(own for own in unit if own.what == "int4(group=64)").size for unit in options)
    for seed in range(draws):
        yield f"random {seed}", drawn(options, size, random.Random(seed))


def drawn(options: Sequence[Sequence[Option[str]]], size: float, chance: random.Random) -> Choice:
    """Formats at random, then single ones drawn anew as long as that brings the sum nearer to the size, to 0.2 %."""
    made = [chance.choice(unit) for unit in options]
    while abs(off := sum(own.size for own in made) - size) > 0.002 * size:
        at = chance.randrange(len(made))
        other = chance.choice(options[at])
        if abs(off + other.size - made[at].size) < abs(off):
            made[at] = other
    return made


def table(rows: list[Row]) -> str:
    """In Markdown."""
    lines = [
        f"| {row.name} | {row.size / 1e6:.1f} | {row.foretold:.3g} | {' / '.join(f'{own:.3g}' for own in row.kl)} |"
        for row in rows
    ]
    return "\n".join(lines)


def draw(lists: Mapping[str, list[Row]], path: Path) -> None:
    """KL over size, by lists of passes, a colour each: the frontier as a line, uniform settings and random draws."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    groups = {"frontier": "o-", "int": "s", "random": "."}
    for colour, (passes, rows) in enumerate(lists.items()):
        for word, style in groups.items():
            own = sorted((row.size / 1e6, row.mean) for row in rows if row.name.startswith(word))
            label = f"{'uniform' if word == 'int' else word}, {passes}"
            axes.plot(*zip(*own, strict=True), style, color=f"C{colour}", label=label) if own else None
    axes.set(yscale="log", xlabel="MB", ylabel="KL to float, nats a token, mean of two texts")
    axes.legend(fontsize="small")
    figure.savefig(path, bbox_inches="tight")


if __name__ == "__main__":
    main()
