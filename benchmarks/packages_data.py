"""Seeded pictures, sounds and texts for the models of packages.py: crude, but of the kind that each model is for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from int8_data import CALIBRATION_TEXT, TEXTS

Feeds = dict[str, np.ndarray]
Make = Callable[[np.random.Generator, bool], Feeds]
MEAN, DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
RATE = 16000


def picture(rng: np.random.Generator, height: int, width: int, channels: int = 3) -> np.ndarray:
    """(channels, height, width) in 0 … 1: uneven light, a dozen discs and bars of one colour each, camera noise."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [
        0.25 * np.sin(columns / width * rng.uniform(1, 9) + rng.uniform(0, 6))
        + 0.25 * np.cos(rows / height * rng.uniform(1, 9))
        for _ in range(channels)
    ]
    out = np.stack(waves) + 0.5
    for _ in range(12):
        y, x, size = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(2, height / 4)
        disc = (rows - y) ** 2 + (columns - x) ** 2 < size**2
        bar = (abs(rows - y) < size / 4) & (abs(columns - x) < size * 2)
        out[:, disc if rng.random() < 0.5 else bar] = rng.random((channels, 1))
    return np.clip(out + rng.normal(0, 0.02, out.shape), 0, 1)


def pictures(name: str, count: int, height: int, width: int, *, channels: int = 3, scale: float = 1.0) -> Make:
    """Pictures in 0 … scale."""

    def make(rng: np.random.Generator, seen: bool) -> Feeds:
        drawn = np.stack([picture(rng, height, width, channels) for _ in range(count)])
        return {name: (scale * drawn).astype(np.float32)}

    return make


def normalized(name: str, count: int, size: int) -> Make:
    """Square pictures by ImageNet's statistics."""
    plain = pictures(name, count, size, size)

    def make(rng: np.random.Generator, seen: bool) -> Feeds:
        scaled = (plain(rng, seen)[name] - MEAN[:, None, None]) / DEVIATION[:, None, None]
        return {name: scaled.astype(np.float32)}

    return make


def sound(rng: np.random.Generator, samples: int, rate: int = RATE) -> np.ndarray:
    """(samples,) of something like a voice: a gliding pitch with overtones, in syllables, and noise."""
    time = np.arange(samples) / rate
    pitch = rng.uniform(80, 300) * (1 + 0.2 * np.sin(2 * np.pi * rng.uniform(0.3, 2) * time + rng.uniform(0, 6)))
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    voice = sum(rng.uniform(0, 1) / k * np.sin(k * phase) for k in range(1, 20))
    syllables = np.clip(np.sin(2 * np.pi * rng.uniform(1, 4) * time + rng.uniform(0, 6)), 0, 1)
    return (0.2 * voice * syllables + rng.normal(0, 10 ** rng.uniform(-4, -2), samples)).astype(np.float32)


def spectrum(rng: np.random.Generator, frames: int, bins: int, hop: int = 160) -> np.ndarray:
    """(frames, bins) of log power of such a sound, scaled to about -1 … 1."""
    size = 2 * (bins - 1)
    heard = sound(rng, frames * hop + size)
    windows = np.stack([heard[i * hop : i * hop + size] for i in range(frames)]) * np.hanning(size)
    power = np.log10(np.abs(np.fft.rfft(windows)) ** 2 + 1e-8)
    return np.asarray((power + 3) / 5, np.float32)


def sounds(name: str, *shape: int, rate: int = RATE, **others: np.ndarray) -> Make:
    """A sound in an array of a shape (its last dimension over 1 is time), beside constants."""

    def make(rng: np.random.Generator, seen: bool) -> Feeds:
        return {name: sound(rng, int(np.prod(shape)), rate).reshape(shape)} | others

    return make


def spectra(name: str, *shape: int, **others: np.ndarray) -> Make:
    """Spectra (…, frames, bins) beside constants."""

    def make(rng: np.random.Generator, seen: bool) -> Feeds:
        count = int(np.prod(shape[:-2]))
        return {name: np.stack([spectrum(rng, *shape[-2:]) for _ in range(count)]).reshape(shape)} | others

    return make


def text_bytes(name: str, count: int, length: int) -> Make:
    """`count` times the first and last half of a passage as bytes, from texts that the other side does not have."""

    def make(rng: np.random.Generator, seen: bool) -> Feeds:
        text = (CALIBRATION_TEXT if seen else TEXTS[int(rng.integers(len(TEXTS)))]).read_bytes()
        starts = rng.integers(0, len(text) - length, count)
        return {name: np.stack([np.frombuffer(text[s : s + length], np.uint8) for s in starts]).astype(np.int32)}

    return make


def codes(vocabulary: int, *shape: int, **inputs: Callable[[np.ndarray], np.ndarray]) -> Make:
    """Random codes of a vocabulary, Zipf-like as letters are; `inputs`: arrays by name, made from them."""
    weights = 1 / np.arange(1, vocabulary + 1)

    def make(rng: np.random.Generator, seen: bool) -> Feeds:
        drawn = rng.choice(vocabulary, shape, p=weights / weights.sum())
        return {name: of(drawn) for name, of in inputs.items()}

    return make


def batches(make: Make, count: int, *, seen: bool) -> Iterator[Feeds]:
    """`count` batches; those for calibration (`seen`) and those for evaluation have no seed in common."""
    return (make(np.random.default_rng([number, int(seen)]), seen) for number in range(count))
