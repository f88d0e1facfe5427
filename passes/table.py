"""Every pass there is."""

from qcompile.passes.awq import Awq
from qcompile.passes.base import Pass, contradiction
from qcompile.passes.bias_correction import BiasCorrection
from qcompile.passes.contrib.attention import FuseAttention
from qcompile.passes.contrib.half import HalfCaches
from qcompile.passes.contrib.kv import Kv
from qcompile.passes.equalize import Equalize
from qcompile.passes.extensions import Table, parameters
from qcompile.passes.fuse import Fuse
from qcompile.passes.gptq import Gptq
from qcompile.passes.group_bits import GroupBits
from qcompile.passes.outlier import Outlier
from qcompile.passes.pack import Pack
from qcompile.passes.prepare import Prepare
from qcompile.passes.qdq.dynamic import Dynamic
from qcompile.passes.qdq.qdq import Qdq
from qcompile.passes.rotate import Rotate
from qcompile.passes.smooth import Smooth


def _check(kind: type[Pass]) -> None:
    """Raise ValueError for a pass of another package that a recipe could not name."""
    for name, parameter in parameters(kind).items():
        if parameter.default is parameter.empty or parameter.annotation is parameter.empty:
            raise ValueError(f"its parameter {name} needs a type and a default")
    if told := contradiction(kind):
        raise ValueError(told)


# By name, in the order in which a full list runs them, and those of other packages.
PASSES: Table[type[Pass]] = Table(
    "qcompile.passes",
    "pass",
    Pass,
    (
        Prepare,
        Smooth,
        Awq,
        Rotate,
        Gptq,
        Pack,
        Fuse,
        FuseAttention,
        Equalize,
        GroupBits,
        Outlier,
        Qdq,
        Dynamic,
        BiasCorrection,
        Kv,
        HalfCaches,
    ),
    check=_check,
)
