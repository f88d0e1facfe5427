"""passes/formats/rows.py: codes of tables whose rows lie along the last axis, by lookup."""

import numpy as np
import pytest
from preparing import parse, run

from qcompile.passes.formats.rows import replace_lookup
from qcompile.passes.spec import PerGroup, QuantSpec


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "width", "stored"), [(4, 64, 4), (8, 64, 8), (4, 33, 8)])
def test_matrices_are_looked_up_within_half_a_step(bits: int, width: int, stored: int, symmetric: bool) -> None:
    """Numbers of one sign cost nothing at 4 bits, whatever grid the weights have; an odd last axis has 8 bits."""
    table = np.random.default_rng(0).uniform(1, 2, (3, 8, width)).astype(np.float32)
    model = parse("y = Gather(t, i)", "int64[N] i", f"float[N,8,{width}] y", t=table)
    chosen = np.array([2, 0, 2])
    nbytes = replace_lookup(model, model.graph[0], QuantSpec(bits, PerGroup(32), symmetric=symmetric))
    (found,) = run(model, {"i": chosen})
    groups = -(-width // 32)
    zero_points = 3 * 8 * groups
    assert nbytes == table.size * stored // 8 + 3 * 8 * groups * 4 + zero_points
    step = (2 / 127.5 if symmetric else 2 / 255) if stored == 8 else 2 / 15
    assert np.abs(found - table[chosen]).max() <= step / 2 + 1e-6
