"""How far int8 models are from their float model, by int8.py: one row a file, the metric that fits the kind of model.

Sessions are plain: onnxruntime's defaults, no library of kernels. Decoders go through `qcompile eval`, at accuracy
level 4, which is what onnxruntime takes where nobody sets one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from int8_data import TEXTS, Feeds, evaluation

Row = dict[str, float | str]
Outputs = list[list[np.ndarray]]
NAMES = [text.stem.removeprefix("eval-") for text in TEXTS]
HEADS: dict[str, tuple[str, ...]] = {
    "decoder": (*(f"{what} {name}" for name in NAMES for what in ("KL", "ppl x", "top-1")), "mean KL"),
    "encoder": ("cosine mean", "cosine min", "hidden cosine", "hidden min", "hidden SQNR dB"),
    "detector": ("SQNR dB", "worst dB", "IoU > 0.3", "IoU min"),
    "recogniser": ("SQNR dB", "worst dB", "same text", "same symbols"),
}


def score(kind: str, reference: Path, models: Sequence[Path], *, tokens: int = 4096) -> list[Row]:
    """One row a model: file, MB, and what HEADS lists; a model that fails has `error` instead."""
    if not models:
        return []
    if kind == "decoder":
        return decoder_rows(reference, models, tokens)
    batches = evaluation(kind, reference)
    expected = run_all(reference, batches)
    rows: list[Row] = []
    for model in models:
        row: Row = {"file": str(model), "MB": round(file_megabytes(model), 2)}
        try:
            row |= METRICS[kind](batches, expected, run_all(model, batches))
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            row["error"] = str(error).splitlines()[0][:300]
        rows.append(row)
    return rows


def run_all(model: Path, batches: Sequence[Feeds]) -> Outputs:
    """All outputs of every batch, in a session with nothing set."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    wanted = [given.name for given in session.get_inputs()]
    return [session.run(None, {name: feeds[name] for name in wanted}) for feeds in batches]


def file_megabytes(model: Path) -> float:
    """The model file and the data files it names, in 10^6 bytes."""
    tensors = onnx.load(model, load_external_data=False).graph.initializer
    named = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    return sum(file.stat().st_size for file in (model, *(model.parent / name for name in named))) / 1e6


# --- decoders ---------------------------------------------------------------------------------------------------------


def decoder_rows(reference: Path, models: Sequence[Path], tokens: int) -> list[Row]:
    """`qcompile eval` of all models at once; where one is refused, of each alone, so that the others get their row."""
    try:
        return evaluated(reference, models, tokens)
    except subprocess.CalledProcessError as failure:
        if len(models) == 1:
            told = [text for text in (failure.stderr or "").strip().splitlines() if text.strip()]
            error = told[-1] if told else f"exit code {failure.returncode}"
            return [{"file": str(models[0]), "MB": round(file_megabytes(models[0]), 2), "error": error[:300]}]
    return [row for model in models for row in decoder_rows(reference, [model], tokens)]


def evaluated(reference: Path, models: Sequence[Path], tokens: int) -> list[Row]:
    """Rows of KL, perplexity ratio and top-1 agreement on the evaluation texts, in windows of 512 tokens."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "scores.json"
        command = [sys.executable, "-m", "qcompile.compiler.cli", "eval", *map(str, models), "--against", reference]
        command += ["--tokenizer", reference.parent, "--kernels", "portable", "--accuracy-level", 4]
        command += ["--text", *TEXTS, "--context", 512, "--tokens", tokens, "--json", result]
        subprocess.run(
            list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        scores = json.loads(result.read_text(encoding="utf-8"))
    rows: dict[str, Row] = {str(model): {"file": str(model), "MB": round(file_megabytes(model), 2)} for model in models}
    floats = {entry["text"]: entry["perplexity"] for entry in scores if entry["kl"] is None}
    for entry in scores:
        if entry["kl"] is not None:
            row, name = rows[entry["model"]], Path(entry["text"]).stem.removeprefix("eval-")
            row |= {f"KL {name}": entry["kl"], f"ppl x {name}": entry["perplexity"] / floats[entry["text"]]}
            row |= {f"top-1 {name}": entry["agreement"], f"KL error {name}": entry["kl_error"]}
            row["mean KL"] = float(row.get("mean KL", 0)) + entry["kl"] / len(TEXTS)
    return list(rows.values())


# --- encoders and pictures --------------------------------------------------------------------------------------------


def encoder_row(batches: Sequence[Feeds], expected: Outputs, found: Outputs) -> Row:
    """Cosines of sentence embeddings (the mean of a sentence's tokens), and of the tokens' hidden states themselves."""
    pooled, tokens, signal, noise = [], [], 0.0, 0.0
    for feeds, theirs, ours in zip(batches, expected, found, strict=True):
        mask = feeds["attention_mask"].astype(bool)
        a, b = (next(array for array in outputs if array.ndim == 3).astype(np.float64) for outputs in (theirs, ours))
        pooled.append(cosines(mean_of(a, mask), mean_of(b, mask)))
        tokens.append(cosines(a[mask], b[mask]))
        signal, noise = signal + float(np.square(a[mask]).sum()), noise + float(np.square(a[mask] - b[mask]).sum())
    sentence, token = np.concatenate(pooled), np.concatenate(tokens)
    values = (sentence.mean(), sentence.min(), token.mean(), token.min(), decibels(signal, noise))
    return dict(zip(HEADS["encoder"], map(float, values), strict=True))


def detector_row(batches: Sequence[Feeds], expected: Outputs, found: Outputs) -> Row:
    """SQNR of the probability map, over all pages and of the worst; overlap of the areas above 0.3, as PP-OCR cuts."""
    overlaps = []
    for theirs, ours in zip(expected, found, strict=True):
        a, b = theirs[0] > 0.3, ours[0] > 0.3
        overlaps.append(float((a & b).sum() / max(1, (a | b).sum())))
    values = (*noises(expected, found), float(np.mean(overlaps)), min(overlaps))
    return dict(zip(HEADS["detector"], values, strict=True))


def recogniser_row(batches: Sequence[Feeds], expected: Outputs, found: Outputs) -> Row:
    """SQNR of the probabilities; shares of lines read alike after CTC, and of positions with the same best symbol."""
    lines, symbols = [], []
    for theirs, ours in zip(expected, found, strict=True):
        for a, b in zip(theirs[0].argmax(-1), ours[0].argmax(-1), strict=True):
            symbols += (a == b).tolist()
            lines.append(collapsed(a) == collapsed(b))
    values = (*noises(expected, found), float(np.mean(lines)), float(np.mean(symbols)))
    return dict(zip(HEADS["recogniser"], values, strict=True))


METRICS = {"encoder": encoder_row, "detector": detector_row, "recogniser": recogniser_row}


def mean_of(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Hidden states (batch, length, width) averaged over the tokens that the mask (batch, length) keeps."""
    return np.einsum("blw,bl->bw", hidden, mask.astype(np.float64)) / mask.sum(axis=1, keepdims=True)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row of a with the same row of b."""
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return (a * b).sum(axis=-1) / np.maximum(lengths, 1e-30)


def noises(expected: Outputs, found: Outputs) -> tuple[float, float]:
    """SQNR in dB of the first output, over all batches together and of the worst batch."""
    pairs = [(a[0].astype(np.float64), b[0].astype(np.float64)) for a, b in zip(expected, found, strict=True)]
    each = [(float(np.square(a).sum()), float(np.square(a - b).sum())) for a, b in pairs]
    total = decibels(sum(signal for signal, _ in each), sum(noise for _, noise in each))
    return total, min(decibels(signal, noise) for signal, noise in each)


def decibels(signal: float, noise: float) -> float:
    """Signal over noise; infinite without noise."""
    return float(10 * np.log10(signal / noise)) if noise else float("inf")


def collapsed(symbols: np.ndarray) -> list[int]:
    """CTC: repetitions joined, blanks (0) dropped."""
    kept = np.concatenate([[True], symbols[1:] != symbols[:-1]])
    return [int(symbol) for symbol in symbols[kept] if symbol]


def score_table(kind: str, rows: Sequence[Row]) -> str:
    """A Markdown table of the rows, errors in place of figures."""
    lines = ["| file | MB | " + " | ".join(HEADS[kind]) + " |", "|---|" + "---|" * (len(HEADS[kind]) + 1)]
    for row in rows:
        cells = [shortened(str(row["file"])), f"{row['MB']}"]
        cells += [str(row["error"])] if "error" in row else [figure(head, float(row[head])) for head in HEADS[kind]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shortened(path: str) -> str:
    """The folder where the file is just model.onnx, else the file's name with its folder."""
    parts = Path(path).parts
    return parts[-2] if parts[-1] == "model.onnx" and len(parts) > 1 else "/".join(parts[-2:])


def figure(head: str, value: float) -> str:
    """Digits by what it is: dB 2, shares in per cent, ratios and divergences 4."""
    if "dB" in head:
        return f"{value:.2f}"
    if head.startswith(("top-1", "same", "IoU")):
        return f"{value:.2%}"
    return f"{value:.5f}" if "cosine" in head or head == "hidden min" else f"{value:.4f}"
