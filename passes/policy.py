"""Which weight is quantized to what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from qcompile.passes.linears import Embedding, Linear, is_lm_head
from qcompile.passes.spec import QuantSpec


@dataclass(frozen=True)
class Policy:
    """The user's choice, applied to one weight at a time.

    body: spec of ordinary linears. lm_head, embedding: their own spec, or None to keep them in float.
    include, exclude: shell patterns on node and weight names; exclude wins. kept: nodes that stay in float, and why.
    weights_only: products whose weight alone becomes int8 where others compute in integers, and why.
    """

    body: QuantSpec
    lm_head: QuantSpec | None
    embedding: QuantSpec | None
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    kept: Mapping[str, str] = field(default_factory=dict)
    weights_only: Mapping[str, str] = field(default_factory=dict)

    def for_linear(self, linear: Linear, vocabulary: int | None) -> QuantSpec | str:
        """The spec of a linear, or the reason why it stays in float."""
        refusal = self.refusal(linear.name, linear.weight.name or "")
        if refusal:
            return refusal
        if is_lm_head(linear, vocabulary):
            return self.lm_head or "lm_head is kept in float"
        return self.body

    def for_embedding(self, embedding: Embedding) -> QuantSpec | str:
        """The spec of an embedding table, or the reason why it stays in float."""
        return (
            self.refusal(embedding.name, embedding.table.name or "") or self.embedding or "embedding is kept in float"
        )

    def refusal(self, *names: str) -> str:
        """Why a node or weight of these names, the node's first, is not to be quantized, or an empty string."""
        if names[0] in self.kept:
            return self.kept[names[0]]
        for pattern in self.exclude:
            if any(fnmatchcase(name, pattern) for name in names):
                return f"excluded by {pattern!r}"
        if not any(fnmatchcase(name, pattern) for pattern in self.include for name in names):
            return "not among the included names"
        return ""
