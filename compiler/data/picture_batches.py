"""Image files as calibration batches."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from qcompile.compiler.data.feeds import Batch, completed, kept
from qcompile.compiler.data.images import Pictures, described, picture_input, read_picture, stacks
from qcompile.compiler.data.inputs import InputPlan
from qcompile.compiler.data.npz import leading
from qcompile.compiler.files.disk_arrays import Spill


def spread(paths: Sequence[Path], most: int) -> list[Path]:
    """Up to `most` of the images, spread evenly over them."""
    return [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, min(most, len(paths))).round().astype(int))]


def left_out(plan: InputPlan, paths: Sequence[Path], pictures: Pictures, used: int, most: int) -> list[Batch]:
    """Batches of up to `most` of the images that `picture_batches` of `used` leaves out; none where they fill none."""
    chosen = set(spread(paths, used))
    rest = [path for path in paths if path not in chosen]
    first = next(iter(picture_input(plan).given.shape), None) if len(picture_input(plan).given.shape) == 4 else None
    return (
        picture_batches(plan, rest, pictures, most)[0] if len(rest) >= (first if isinstance(first, int) else 1) else []
    )


def picture_batches(plan: InputPlan, paths: Sequence[Path], pictures: Pictures, most: int) -> tuple[list[Batch], str]:
    """(batches, what they are) of `most` of the images, spread evenly over them; decoded once and put aside."""
    layout, spill = picture_input(plan), Spill()
    chosen = spread(paths, most)
    arrays = stacks(chosen, layout, partial(read_picture, layout=layout, pictures=pictures))
    feeds = [completed(plan, {layout.given.name: array}, str(chosen[0])) for array in arrays]
    batches = [Batch(kept(spill, given), leading(given) if len(layout.given.shape) == 4 else 1) for given in feeds]
    told = f"{len(chosen)} images" if len(chosen) == len(paths) else f"{len(chosen)} of {len(paths)} images"
    return batches, f"{told}, {described(layout, pictures)}"
