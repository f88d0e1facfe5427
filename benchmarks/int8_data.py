"""What int8.py calibrates and evaluates on: windows of text, padded sentences, and pictures of lines of text.

Everything is seeded, and calibration and evaluation never share a text: `models/data/calibration.txt` on one side,
`benchmarks/text/eval-*.txt` on the other. Pictures are drawn with Pillow in the one font that it brings along, so that
they are the same on every machine with the same Pillow.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Feeds = dict[str, np.ndarray]
CALIBRATION_TEXT = Path(__file__).resolve().parents[1] / "models" / "data" / "calibration.txt"
TEXTS = tuple(sorted((Path(__file__).parent / "text").glob("eval-*.txt")))
# ImageNet statistics, which PP-OCR's detector applies to channels in the order B, G, R.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Calibration: one size, since onnxruntime's histogram calibrators cannot stack batches of different shapes.
PAGE, LINE = (320, 480), (48, 320)
# Evaluation: sizes that a detector meets (multiples of 32), and line widths that a recogniser does.
PAGES, LINES = ((320, 480), (480, 480), (640, 480), (480, 640)), ((48, 320), (48, 480), (48, 160))


def model_kind(path: Path) -> str:
    """decoder, encoder, detector or recogniser: what the model is, by its inputs and outputs."""
    graph = onnx.load(path, load_external_data=False).graph
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in (*graph.input, *graph.output)}
    outputs = [value.name for value in graph.output]
    if "input_ids" in ranks:
        return "decoder" if "logits" in outputs else "encoder"
    if len(graph.input) == 1 and ranks[graph.input[0].name] == 4:
        return "detector" if ranks[outputs[0]] == 4 else "recogniser"
    raise SystemExit(f"{path}: neither a language model (input_ids) nor one of PP-OCR's (one picture)")


def input_name(path: Path) -> str:
    """The first input of a model."""
    return str(onnx.load(path, load_external_data=False).graph.input[0].name)


# --- text -------------------------------------------------------------------------------------------------------------


def sentences(text: Path, count: int) -> list[str]:
    """Sentences of 5 to 60 words, spread evenly over the text."""
    flat = " ".join(text.read_text(encoding="utf-8").split())
    found = [part for part in re.split(r"(?<=[.!?])\s+", flat) if 5 <= len(part.split()) <= 60]
    return [found[i] for i in np.linspace(0, len(found) - 1, count).astype(int)]


def sentence_batches(model: Path, texts: Sequence[Path], count: int, *, batch: int = 8) -> list[Feeds]:
    """`count` sentences of each text with [CLS] and [SEP], in padded batches; all arrays are (batch, longest)."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(model.parent / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("[PAD]") or 0)
    chosen = [sentence for text in texts for sentence in sentences(text, count)]
    parts = [tokenizer.encode_batch(chosen[start : start + batch]) for start in range(0, len(chosen), batch)]
    return [
        {
            "input_ids": np.array([entry.ids for entry in part], np.int64),
            "attention_mask": np.array([entry.attention_mask for entry in part], np.int64),
            "token_type_ids": np.array([entry.type_ids for entry in part], np.int64),
        }
        for part in parts
    ]


def token_block(model: Path, rows: int, columns: int) -> Feeds:
    """The first tokens of an evaluation text as ids (rows, columns), with a full mask: what speed is measured on."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(model.parent / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    flat = tokenizer.encode(TEXTS[0].read_text(encoding="utf-8"), add_special_tokens=False).ids
    ids = np.array(flat[: rows * columns], np.int64).reshape(rows, columns)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def text_calibration(model: Path, windows: int) -> list[Feeds]:
    """The very batches that qcompile calibrates this model on by default: windows of 512 tokens of the bundled text."""
    from qcompile.compiler.data.calibration import Calibration, Sampling, gather
    from qcompile.compiler.data.inputs import input_plan
    from qcompile.compiler.files.load import load_model

    data = gather(input_plan(load_model(model)), model, Sampling(windows, 512), Calibration(), needed=True)
    return [batch.feeds for batch in data.calibration]


# --- pictures ---------------------------------------------------------------------------------------------------------


def pictures(kind: str, name: str, texts: Sequence[Path], sizes: Sequence[tuple[int, int]], count: int, seed: int,
             *, batch: int = 1) -> list[Feeds]:  # fmt: skip
    """`count` batches of pictures of text for a detector or recogniser: {name: (batch, 3, H, W) float32}."""
    rng = np.random.default_rng(seed)
    words = [word for text in texts for word in text.read_text(encoding="utf-8").split()]
    draw: Callable[..., np.ndarray] = page if kind == "detector" else line
    made = []
    for number in range(count):
        size = sizes[number % len(sizes)]
        made.append({name: np.stack([draw(rng, words, *size) for _ in range(batch)])})
    return made


def page(rng: np.random.Generator, words: Sequence[str], height: int, width: int) -> np.ndarray:
    """A page of printed text as PP-OCR's detector takes it: (3, height, width), B G R, by ImageNet statistics."""
    paper, ink = colours(rng)
    image = Image.new("RGB", (width, height), paper)
    pen = ImageDraw.Draw(image)
    source = spoken(rng, words)
    y = float(rng.uniform(4, 40))
    while y < height - 8:
        size = int(rng.integers(11, 34))
        font = ImageFont.load_default(size)
        x = float(rng.uniform(4, width / 4))
        until = x + float(rng.uniform(0.3, 1.0)) * (width - x - 4)
        pen.text((x, y), fitting(source, font, until - x), font=font, fill=ink)
        y += size * float(rng.uniform(1.15, 2.4))
    pixels = weathered(rng, image.rotate(tilt(rng), Image.Resampling.BICUBIC, fillcolor=paper))
    scaled = (pixels[..., ::-1] / 255 - np.array(MEAN)) / np.array(DEVIATION)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1), np.float32)


def line(rng: np.random.Generator, words: Sequence[str], height: int, width: int) -> np.ndarray:
    """A line of text as PP-OCR's recogniser takes it: (3, height, width), B G R in [-1, 1], zeros to its right."""
    paper, ink = colours(rng)
    font = ImageFont.load_default(int(rng.integers(18, 44)))
    margin = int(rng.integers(2, 9))
    tall = sum(font.getmetrics()) + 2 * margin
    share = float(rng.uniform(0.5, 1.0))
    text = fitting(spoken(rng, words), font, share * width * tall / height - 2 * margin)
    image = Image.new("RGB", (int(font.getlength(text)) + 2 * margin, tall), paper)
    ImageDraw.Draw(image).text((margin, margin), text, font=font, fill=ink)
    image = image.rotate(tilt(rng) / 3, Image.Resampling.BICUBIC, fillcolor=paper)
    image = image.resize((min(width, round(image.width * height / tall)), height), Image.Resampling.BILINEAR)
    out = np.zeros((3, height, width), np.float32)
    out[..., : image.width] = (weathered(rng, image)[..., ::-1] / 255 - 0.5).transpose(2, 0, 1) / 0.5
    return out


def spoken(rng: np.random.Generator, words: Sequence[str]) -> Iterator[str]:
    """The words from a random place on."""
    start = int(rng.integers(len(words) - 1000))
    return iter(words[start:])


def fitting(source: Iterator[str], font: Any, width: float) -> str:
    """As many of the next words as fit, one at least."""
    text = next(source)
    for word in source:
        if font.getlength(f"{text} {word}") > width:
            break
        text = f"{text} {word}"
    return text


def colours(rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Paper and ink: dark on light or, once in five, light on dark; slightly tinted, 70 to 255 levels apart."""
    light = rng.uniform(170, 255)
    dark = rng.uniform(0, light - 70 if rng.random() < 0.5 else 60)
    paper, ink = (light, dark) if rng.random() < 0.8 else (dark, light)
    tints = rng.uniform(-12, 12, (2, 3))
    tinted = [np.clip(level + tint, 0, 255).astype(int) for level, tint in zip((paper, ink), tints, strict=True)]
    return tuple(tinted[0].tolist()), tuple(tinted[1].tolist())


def tilt(rng: np.random.Generator) -> float:
    """Degrees of a page laid down by hand."""
    return float(np.clip(rng.normal(0, 2), -5, 5))


def weathered(rng: np.random.Generator, image: Image.Image) -> np.ndarray:
    """The pixels (H, W, 3), blurred and noisy as a camera gives them, in uneven light; 0 … 255."""
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 0.9)))), np.float64)
    slope = np.linspace(*rng.uniform(0.85, 1.0, 2), image.width)[None, :, None]
    noise = rng.normal(0, rng.uniform(0, 9), blurred.shape)
    return np.clip(blurred * slope + noise, 0, 255).round()


# --- by kind of model -------------------------------------------------------------------------------------------------


def calibration(kind: str, model: Path, windows: int = 32) -> list[Feeds]:
    """Calibration batches: windows of text; 32 pages; 32 times four lines."""
    if kind in ("decoder", "encoder"):
        return text_calibration(model, windows)
    size, batch = (PAGE, 1) if kind == "detector" else (LINE, 4)
    return pictures(kind, input_name(model), [CALIBRATION_TEXT], [size], windows, seed=1, batch=batch)


def evaluation(kind: str, model: Path) -> list[Feeds]:
    """Evaluation batches of all but decoders: 200 sentences in batches of 8; 24 pages; 60 lines."""
    if kind == "encoder":
        return sentence_batches(model, TEXTS, 100)
    sizes, count = (PAGES, 24) if kind == "detector" else (LINES, 60)
    return pictures(kind, input_name(model), TEXTS, sizes, count, seed=2)


def workload(kind: str, model: Path) -> tuple[str, Feeds]:
    """(name, feeds) of the run that speed is measured on."""
    if kind == "decoder":
        return "prefill of 512 tokens", token_block(model, 1, 512)
    if kind == "encoder":
        return "8 texts of 128 tokens", token_block(model, 8, 128)
    height, width = PAGE if kind == "detector" else LINE
    return f"one picture of {height} x {width}", evaluation(kind, model)[0]


def write_npz(batches: Sequence[Feeds], folder: Path) -> list[Path]:
    """One .npz file for each batch, arrays by input name, as `qcompile --calibration` takes them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"batch-{number:03}.npz" for number in range(len(batches))]
    for path, feeds in zip(paths, batches, strict=True):
        np.savez(path, **feeds)
    return paths
