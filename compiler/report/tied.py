"""Weights that several nodes read: what is counted once, and what is stored once."""

from qcompile.passes.base import Decision


class Tied:
    """Told the decisions on nodes one by one, in order.

    Invariant: weights add up to those of the model, each counted at its first node; bytes to those that are stored. A
    head that is tied to an embedding and has another form has bytes of its own, and no weights.
    """

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._stored: set[tuple[str, int | str]] = set()

    def weights(self, decision: Decision) -> int:
        """Elements that no decision before was about."""
        name = str(decision.detail.get("weight", decision.node))
        count = 0 if name in self._seen else int(decision.detail.get("weights", 0))
        self._seen.add(name)
        return count

    def nbytes(self, decision: Decision) -> int | None:
        """Bytes of the weight in this form; None where an earlier node's are the same ones."""
        name = str(decision.detail.get("weight", decision.node))
        nbytes = int(decision.detail.get("bytes", 4 * int(decision.detail.get("weights", 0))))
        forms: set[tuple[str, int | str]] = {(name, decision.group), (name, nbytes)}
        shared = bool(forms & self._stored)
        self._stored |= forms
        return None if shared else nbytes
