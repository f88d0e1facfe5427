"""The settings of a recipe as keywords: what a type checker and an editor know of `qcompile.compile(…)`."""

from collections.abc import Sequence
from typing import Literal, TypedDict

from qcompile.compiler.settings.steps import Step
from qcompile.passes.targets import TargetName


class Fields(TypedDict, total=False):
    """The keys of a recipe but for `passes`, with the values that a recipe file has for them (docs/recipe.md)."""

    bits: Literal[4, 8]
    group_size: int
    symmetric: bool
    weights: str | Step | None
    weights_of: str | Sequence[str]
    target: TargetName
    lm_head: Literal[4, 8] | str | Step | None
    embedding: Literal[4, 8] | str | Step | None
    activations: Literal[8, 16, "auto"] | None
    accuracy_level: Literal[0, 4, "auto"] | None
    scale_bits: Literal[16, 32]
    attention: Literal["fused", "plain"]
    caches: Literal["auto", "float16", "float"]
    include: str | Sequence[str]
    exclude: str | Sequence[str]
    samples: int
    context: int
    min_coverage: float | Literal["auto"] | None
    min_cosine: float
    seed: int
    provider: str
    keep_as: Literal["auto", "weights", "float"]
    keep_worst: int | None
    keep_share: float | None
    max_kl: float | None
    min_sqnr: float | None
    budget: str | None
    fastest: bool
