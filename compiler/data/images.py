"""Image files as batches of an image model: size and layout from its input, numbers as its training saw them."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.compiler.data.inputs import Dim, Input, InputPlan
from qcompile.passes.errors import UserError

Array = npt.NDArray[Any]

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Means and deviations of ImageNet's pixels, which most vision networks were trained with.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Image modes by number of channels.
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# A free size is the image's own, its longer side no more than this, in steps that every common stride divides.
_LONGEST, _STEP = 640, 32
# Height and width that may be asked for: a side of 16384 is 3 GB a picture in float32.
_MOST = 16384


@dataclass(frozen=True)
class Pictures:
    """How pixels become numbers: (pixel · scale - mean) / std by channel (RGB), pixels 0 to 255.

    mean, std: one number, or one a channel; None for those of preprocessor_config.json beside the model, else
    ImageNet's. size: (height, width) for an input whose size is free. An input of integers takes pixels as they are.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[int, int] | None = None
    scale: float = 1 / 255
    origin: str = "ImageNet's mean and deviation"

    def __post_init__(self) -> None:
        if any(not np.isfinite(number) for number in (*(self.mean or ()), *(self.std or ()))):
            raise UserError("image mean and std must be finite numbers")
        if self.std is not None and min(self.std, default=0) <= 0:
            raise UserError(f"image std must be positive, got {self.std}")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise UserError(f"image size must be height and width, got {self.size}")
        if self.size is not None and max(self.size) > _MOST:
            raise UserError(f"image size must be {_MOST} at most, got {self.size}")

    def beside(self, model: Path) -> "Pictures":
        """With what is not given here from preprocessor_config.json beside the model, or one folder up of `onnx`."""
        if self.mean is not None or self.std is not None:
            mean, std = self.mean or (0.0,), self.std or (1.0,)
            return replace(self, mean=mean, std=std, origin="as told")
        folder = model.absolute().parent
        for place in (folder, folder.parent) if folder.name == "onnx" else (folder,):
            told = _config(place / "preprocessor_config.json")
            if told is not None:
                return replace(told, size=self.size or told.size)
        return replace(self, mean=_IMAGENET[0], std=_IMAGENET[1])


@dataclass(frozen=True)
class Layout:
    """Where an image input has its axes. height, width: None where free."""

    given: Input
    channels_first: bool
    channels: int
    height: int | None
    width: int | None

    @classmethod
    def of(cls, given: Input) -> "Layout":
        """Of an input (batch, channels, height, width), (batch, height, width, channels), or one without a batch."""
        dims = given.shape[-3:]
        first = _is_channels(dims[0]) or (not _is_channels(dims[2]) and not isinstance(dims[0], int))
        if not first and not _is_channels(dims[2]) and isinstance(dims[2], int):
            raise UserError(
                f"input {given.name!r} {list(given.shape)} has no axis of 1, 3 or 4 channels: give .npz files"
            )
        channels, height, width = dims if first else (dims[2], dims[0], dims[1])
        return cls(given, first, channels if isinstance(channels, int) else 3, _fixed(height), _fixed(width))

    def check(self, size: tuple[int, int] | None) -> None:
        """Raise UserError where a size is asked for (height, width) that the input does not take."""
        own = (self.height, self.width)
        if size is not None and any(fixed not in (None, asked) for fixed, asked in zip(own, size, strict=True)):
            raise UserError(
                f"input {self.given.name!r} {list(self.given.shape)} takes images of {self.height}×{self.width}, "
                f"not of {size[0]}×{size[1]}: leave out --image-size"
            )


def picture_input(plan: InputPlan) -> Layout:
    """The only input that needs data, if it takes images; UserError otherwise."""
    needed = plan.required
    fits = len(needed) == 1 and len(needed[0].shape) in (3, 4) and not needed[0].is_string
    if not fits or needed[0].dtype.kind == "b":
        names = ", ".join(f"{given.name} {list(given.shape)}" for given in needed) or "none"
        raise UserError(f"images serve a model with one input of images, this one takes {names}: give .npz files")
    return Layout.of(needed[0])


def read_picture(path: Path, layout: Layout, pictures: Pictures) -> Array:
    """An image as the input takes it, without a batch axis: cropped to its shape around the middle, after resizing."""
    opened = _opened(path, _MODES[layout.channels])
    width, height = _size(opened.size, layout, pictures)
    pixels = np.asarray(_fit(opened, (width, height)), np.uint8).reshape(height, width, layout.channels)
    numbers = pixels if layout.given.dtype.kind in "iu" else _normalized(pixels, pictures)
    ordered = np.moveaxis(numbers, 2, 0) if layout.channels_first else numbers
    made: Array = np.ascontiguousarray(ordered.astype(layout.given.dtype))
    return made


def stacks(paths: Sequence[Path], layout: Layout, read: Callable[[Path], Array]) -> Iterator[Array]:
    """Images as arrays of the input's shape: as many at a time as its batch axis fixes, else one."""
    given = layout.given
    if len(given.shape) == 3:
        yield from map(read, paths)
        return
    count = given.shape[0] if isinstance(given.shape[0], int) and given.shape[0] > 0 else 1
    if len(paths) < count:
        raise UserError(f"input {given.name!r} takes {count} images at a time, {len(paths)} were given")
    for start in range(0, len(paths) - count + 1, count):
        yield np.stack([read(path) for path in paths[start : start + count]])


def described(layout: Layout, pictures: Pictures) -> str:
    """What is done to images, in words for the report."""
    told = pictures.size or (None, None)
    height, width = layout.height or told[0], layout.width or told[1]
    size = f"{height}×{width}" if height and width else f"of their own size up to {_LONGEST} in steps of {_STEP}"
    shown = f"{size} {_MODES[layout.channels]}, cropped to fit"
    shown += ", channels first" if layout.channels_first else ", channels last"
    if layout.given.dtype.kind in "iu":
        return f"{shown}, pixels 0 to 255"
    mean, std = (_listed(numbers or ()) for numbers in (pictures.mean, pictures.std))
    return f"{shown}, (pixel·{pictures.scale:.4g} - {mean}) / {std} ({pictures.origin})"


def _listed(numbers: Sequence[float]) -> str:
    return f"{numbers[0]:g}" if len(set(numbers)) == 1 else "[" + ", ".join(f"{n:g}" for n in numbers) + "]"


def _is_channels(dim: Dim) -> bool:
    return dim in _MODES


def _fixed(dim: Dim) -> int | None:
    return dim if isinstance(dim, int) and dim > 0 else None


def _size(own: tuple[int, int], layout: Layout, pictures: Pictures) -> tuple[int, int]:
    """(width, height) that the image gets."""
    shrink = min(1.0, _LONGEST / max(own))
    free = [max(_STEP, int(side * shrink) // _STEP * _STEP) for side in own]
    told = pictures.size or (None, None)
    return layout.width or told[1] or free[0], layout.height or told[0] or free[1]


def _normalized(pixels: Array, pictures: Pictures) -> Array:
    """Pixels (height, width, channels) as the training saw them, float32; an image without colours has mean ones."""
    mean, std = (_by_channel(numbers or (), pixels.shape[2]) for numbers in (pictures.mean, pictures.std))
    made: Array = (pixels * np.float32(pictures.scale) - mean) / std
    return made


def _by_channel(numbers: Sequence[float], channels: int) -> Array:
    own = np.asarray(numbers, np.float32)
    if len(own) in (1, channels):
        return own
    if channels == 1:
        return np.array([own.mean()], np.float32)
    if (len(own), channels) == (3, 4):  # opacity
        return np.append(own, own.mean()).astype(np.float32)
    raise UserError(f"{len(own)} image means or deviations for {channels} channels: give one, or one a channel")


def _pillow() -> Any:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise UserError("images need Pillow: pip install pillow, or give .npy or .npz files") from error
    return Image, ImageOps


def _opened(path: Path, mode: str) -> Any:
    image, operations = _pillow()
    if path.exists() and not path.is_file():  # reading a pipe may wait for ever
        raise UserError(f"{path} is not a regular file: save the image in one")
    try:
        with image.open(path) as opened:
            upright: Any = operations.exif_transpose(opened)
            if upright.mode.startswith(
                "I"
            ):  # 16 bits a pixel, of which Pillow's own conversion cuts off what is above 255
                upright = image.fromarray((np.asarray(upright).clip(0, 65535) >> 8).astype(np.uint8))
            return upright.convert(mode)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such image file") from error
    except Exception as error:  # Pillow raises whatever the decoder of the format does
        raise UserError(f"{path} is not a readable image: {' '.join(str(error).split())[:200]}") from error


def _fit(opened: Any, size: tuple[int, int]) -> Any:
    image, operations = _pillow()
    return operations.fit(opened, size, method=image.Resampling.BICUBIC)


def _config(path: Path) -> Pictures | None:
    """What a preprocessor_config.json of transformers says; None where there is none, or one that names no numbers.

    UserError for a damaged one: numbers of other means than the training's would calibrate another network.
    """
    if not path.exists():
        return None
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        normalized = told.get("do_normalize", True)
        if normalized and told.get("image_mean") is None:
            return None
        scale = told.get("rescale_factor", 1 / 255) if told.get("do_rescale", True) else 1.0
        if not np.isfinite(float(scale)):
            raise ValueError(f"its rescale_factor is {scale}")
        names = ("image_mean", "image_std") if normalized else ()
        mean, std = [tuple(map(float, np.atleast_1d(told[name]))) for name in names] or ((0.0,), (1.0,))
        return Pictures(mean, std, _told_size(told), float(scale), f"{path.name} beside the model")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, UserError) as error:
        raise UserError(
            f"{path} says nothing that can be used ({' '.join(str(error).split())[:100]}): mend or remove it, "
            "or give --image-mean and --image-std"
        ) from error


def _told_size(told: dict[str, Any]) -> tuple[int, int] | None:
    for name in ("crop_size", "size"):
        size = told.get(name)
        if isinstance(size, int) and not isinstance(size, bool):
            return size, size
        if isinstance(size, dict) and "shortest_edge" in size:
            return int(size["shortest_edge"]), int(size["shortest_edge"])
        if isinstance(size, dict) and {"height", "width"} <= set(size):
            return int(size["height"]), int(size["width"])
    return None
