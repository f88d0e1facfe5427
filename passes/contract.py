"""What a pass declares: when it runs, what it reads of the calibration data, what it needs, ensures and takes.

A list of passes is checked by these facts before any work is done (`compiler/plan.py`), and each pass is held to what
it ensures while it runs (`compiler/walk/promises.py`).
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from enum import Enum, IntEnum


class Stage(IntEnum):
    """When a pass runs, and how often.

    BEFORE: once, over the whole graph, before it is cut into segments. WALK: once for each segment, with its
    statistics. BEHIND: once, over the whole graph, behind the walk.
    """

    BEFORE = 0
    WALK = 1
    BEHIND = 2


class Reads(Enum):
    """What a pass cannot work without of the calibration data.

    SCALES: how loud the channels of a linear's input are; statistics guessed from constants (`proxies`) will do.
    STATISTICS: the Gram matrices of linears' inputs, for which nothing else will do.
    CHANNELS: how far each channel of a segment's activations goes, by observers that the pass gives (`Pass.watched`).
    RANGES: of activations, by the observers that the pass gives (`Pass.observed`).
    OUTPUTS: of nodes of the finished graph, in a walk of its own (`WalksAgain`).
    """

    SCALES = "scales"
    STATISTICS = "statistics"
    CHANNELS = "channels"
    RANGES = "ranges"
    OUTPUTS = "outputs"


class Fact(Enum):
    """What can hold of a model between two passes; the value names it in messages.

    CANONICAL: every node has a name of its own and stands behind those that it reads.
    FLOAT: weights are floats. What takes this quantizes: its decisions say which weights became codes.
    CLIP, CODES: of each linear that it decided on, the pass left how its weight is to be rounded, or codes of it.
    OUTLIERS: of each linear that it marked, the pass left the channels that stay in float.
    GROUPS: of each linear that it split, the parts have grids of their own, which they are to be stored in.
    PACKED: quantized products are operators of a weight format, each with its float weight to be checked against.
    INTEGER: quantized products compute in integers, each with its float form to be checked against.
    STATIC: nodes told to be so read activations on fixed grids, behind QuantizeLinear and DequantizeLinear.
    PARTS: attention is as the file wrote it. What computes in integers ends it: its float twins read the parts.
    FUSED: attention over caches is a GroupQueryAttention where it can be one; others have their reason.
    CACHES: caches told to be so are codes, which the graph takes and gives.
    """

    CANONICAL = "canonical nodes"
    FLOAT = "float weights"
    CLIP = "clipped ranges"
    CODES = "chosen codes"
    OUTLIERS = "marked outliers"
    GROUPS = "groups of several bits"
    PACKED = "packed products"
    INTEGER = "integer products"
    STATIC = "fixed ranges"
    PARTS = "parts of attention"
    FUSED = "fused attention"
    CACHES = "coded caches"


@dataclass(frozen=True)
class Added:
    """What adds a pass to lists that do not name it: a setting of the recipe of this value, for these targets.

    It comes last, in lists that ensure `behind`, but before those that need or prefer what it ensures; of several such
    passes in the order of the table. parameters: those that it has then. applications: those it has beside in a model
    that one application alone is to run, by what the command line calls that. alone: applications that have the pass
    where the setting is "auto", too.
    """

    setting: str
    value: str
    behind: Fact
    targets: Set[str]
    parameters: Mapping[str, object] = field(default_factory=dict)
    applications: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    alone: Set[str] = frozenset()


# What is left for a later pass to take; without one, it would be lost.
PENDING = (Fact.CLIP, Fact.CODES, Fact.OUTLIERS, Fact.GROUPS)
# What passes of the walk are for.
WEIGHTS = frozenset({Fact.CANONICAL, Fact.FLOAT})
