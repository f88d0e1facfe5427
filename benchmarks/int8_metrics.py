"""How far int8 models are from their float model, by int8.py: one row a file, the metric that fits the kind of model.

Sessions are plain: onnxruntime's defaults, no library of kernels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
    """All outputs of every batch."""
    session = plain_session(model)
    wanted = [given.name for given in session.get_inputs()]
    return [session.run(None, {name: feeds[name] for name in wanted}) for feeds in batches]


def plain_session(model: Path) -> Any:
    """A session with nothing set."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def file_megabytes(model: Path) -> float:
    """The model file and the data files it names, in 10^6 bytes."""
    tensors = onnx.load(model, load_external_data=False).graph.initializer
    named = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    return sum(file.stat().st_size for file in (model, *(model.parent / name for name in named))) / 1e6


# --- decoders ---------------------------------------------------------------------------------------------------------


def decoder_rows(reference: Path, models: Sequence[Path], tokens: int) -> list[Row]:
    """KL, perplexity ratio and top-1 agreement on the evaluation texts, as `qcompile eval` computes them.

    One model is loaded at a time; the float model's log probabilities lie on disk: 1.6 GB for SmolLM2.
    """
    from qcompile.compiler.data.inputs import input_plan
    from qcompile.compiler.data.tokens import load_tokenizer
    from qcompile.compiler.files.load import load_model
    from qcompile.compiler.measure.loaded import text_windows
    from qcompile.compiler.measure.metrics import log_softmax_rows

    plan, tokenizer = input_plan(load_model(reference)), load_tokenizer(reference.parent)
    texts = {name: text_windows(text, tokenizer, plan, 512, tokens) for name, text in zip(NAMES, TEXTS, strict=True)}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        known = Path(folder)
        for name, index, logits in window_logits(reference, texts):
            np.save(known / f"{name}-{index}.npy", log_softmax_rows(logits))
        own = text_scores(reference, texts, known)
        for model in models:
            row: Row = {"file": str(model), "MB": round(file_megabytes(model), 2)}
            try:
                row |= decoder_row(text_scores(model, texts, known), own)
            except Exception as error:  # onnxruntime's exceptions share no base but Exception
                row["error"] = str(error).splitlines()[0][:300]
            rows.append(row)
    return rows


def window_logits(model: Path, texts: Mapping[str, Sequence[np.ndarray]]) -> Iterator[tuple[str, int, np.ndarray]]:
    """(text, number of the window, logits (L - 1, V) of all its tokens but the last)."""
    session = plain_session(model)
    wanted = [given.name for given in session.get_inputs()]
    for name, windows in texts.items():
        for index, window in enumerate(windows):
            ids = window[None]
            feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
            feeds["position_ids"] = np.arange(ids.shape[1])[None]
            yield name, index, session.run(["logits"], {key: feeds[key] for key in wanted})[0][0, :-1]


def text_scores(model: Path, texts: Mapping[str, Sequence[np.ndarray]], known: Path) -> dict[str, Any]:
    """qcompile's TokenScores of each text, against the log probabilities in the folder `known`."""
    from qcompile.compiler.measure.metrics import TokenScores

    scores = {name: TokenScores() for name in texts}
    for name, index, logits in window_logits(model, texts):
        scores[name].add(logits, texts[name][index][1:], np.load(known / f"{name}-{index}.npy", mmap_mode="r"))
    return scores


def decoder_row(scores: Mapping[str, Any], floats: Mapping[str, Any]) -> Row:
    """The figures of a model, and `KL error`: its standard error over tokens."""
    from qcompile.compiler.measure.metrics import mean_and_error

    row: Row = {}
    for name, score in scores.items():
        row[f"KL {name}"], row[f"KL error {name}"] = mean_and_error(score.kl)
        row[f"ppl x {name}"] = float(np.exp(mean_and_error(score.nll)[0] - mean_and_error(floats[name].nll)[0]))
        row[f"top-1 {name}"] = float(np.concatenate(score.agree).mean())
    return row | {"mean KL": float(np.mean([float(row[f"KL {name}"]) for name in scores]))}


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
