"""The order of a model's integer nodes by their effect, and finished orders on disk."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qcompile.compiler.console.numbers import decibels
from qcompile.compiler.data.calibration import Calibration
from qcompile.compiler.data.calibration_files import GENERAL
from qcompile.compiler.data.tokens import find_tokenizer
from qcompile.compiler.files.cache import Cache, digest, files_digest
from qcompile.compiler.results.sheet import Sheet, Shown
from qcompile.models.cache import cache_dir
from qcompile.passes.errors import UserError

_log = logging.getLogger(__name__)

# Raised with every change of what is measured, or how.
_VERSION = 5
# Settings that do not change the ranking.
_LATER = (
    "keep_worst",
    "keep_share",
    "keep_as",
    "max_kl",
    "min_sqnr",
    "min_coverage",
    "min_cosine",
    "target",
    "activations",
    "bits",
    "weights",
    "group_size",
    "symmetric",
)


@dataclass(frozen=True)
class Ranked:
    """One node that may be integer. weights: its elements, nbytes: theirs in float. effect: of it alone."""

    node: str
    operator: str
    weights: int
    nbytes: int
    effect: float


@dataclass(frozen=True, repr=False)
class Ranking(Shown):
    """Nodes by falling effect, each integer alone while all others are float.

    metric: KL (nats a token) or SQNR, whose effects are relative errors. windows: what was measured on, in words.
    all_float: with no integer node; what other passes changed, and rounding errors. all_integer: with all of them.
    """

    metric: str
    windows: str
    all_float: float
    all_integer: float
    nodes: tuple[Ranked, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def records(self) -> list[dict[str, Any]]:
        """A row for each node."""
        return [{"rank": rank, **asdict(node)} for rank, node in enumerate(self.nodes, 1)]

    def told(self, effect: float) -> str:
        """An effect as tables have it."""
        return f"{effect:.2e}" if self.metric == "KL" else f"{decibels(effect):.1f}"

    def sheet(self, shown: int = 10) -> Sheet:
        """The worst nodes, and all together."""
        kl, count = self.metric == "KL", len(self.nodes)
        rows = [
            [str(rank), node.node, node.operator, f"{node.nbytes / 1e6:.2f}", self.told(node.effect)]
            for rank, node in enumerate(self.nodes[:shown], 1)
        ]
        unit = "KL in nats a token" if kl else "SQNR of the output that is worst off"
        more = f"{count - shown} more nodes; " if count > shown else ""
        ends = f"all {count} nodes integer: {self.told(self.all_integer)}, none: {self.told(self.all_float)} ({unit})"
        heads = ("rank", "node", "operator", "weights MB", "KL alone" if kl else "SQNR alone, dB")
        notes = (f"{more}{ends}", f"data      {self.windows}; took {self.seconds:.0f} s")
        return Sheet("", heads, rows, 2, notes)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Ranking":
        """The ranking of plain values; KeyError or TypeError where they are none."""
        nodes = tuple(Ranked(**node) for node in plain["nodes"])
        return cls(**{**plain, "nodes": nodes})


class RankingCache:
    """The place of one ranking. Nothing is kept of data whose content no digest of files tells: a function's, say.

    Where there is no place to write, the ranking is made anew each time: no reason to lose one that is made.
    settings: all that a recipe says. judged: the accuracy is told on other data, so that no rows are held aside for it.
    """

    def __init__(
        self,
        model: Path,
        source_hash: str,
        settings: Mapping[str, Any],
        versions: dict[str, str],
        calibration: Calibration,
        statistics: Path | str | None = None,
        *,
        judged: bool = False,
    ) -> None:
        self._key: str | None = None
        if not calibration.only_files:
            return
        try:
            self._cache = Cache(cache_dir() / "sensitivity")
        except UserError as error:
            _log.warning("the ranking is not kept: %s", error)
            return
        beside = find_tokenizer(calibration.tokenizer or model)
        word = GENERAL if calibration.general else calibration.word
        read = [*calibration.paths, *([beside] if beside else []), *([statistics] if statistics else [])]
        own = {name: value for name, value in settings.items() if name not in _LATER}
        bounded = any(settings.get(name) is not None for name in ("keep_share", "max_kl", "min_sqnr"))
        own |= {"bounded": True} if bounded else {}  # ranked on a part of what is held aside
        own |= {"judged": True} if judged else {}
        content = {"version": _VERSION, "model": source_hash, "recipe": own, "data": files_digest(read)}
        self._key = digest(content | {"versions": versions} | ({"word": word} if word else {}))

    def get(self) -> Ranking | None:
        """The ranking that is there; None without one."""
        plain = self._cache.get(self._key) if self._key else None
        try:
            return Ranking.from_dict(plain) if plain is not None else None
        except (KeyError, TypeError):  # written by another version
            return None

    def put(self, ranking: Ranking) -> None:
        """Keep a ranking."""
        if self._key:
            try:
                self._cache.put(self._key, ranking.to_dict())
            except UserError:
                _log.warning("the ranking is not kept: %s cannot be written; set QCOMPILE_CACHE", self._cache.folder)
