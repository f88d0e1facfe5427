"""A piece of a graph that any process can run: each opens the session for itself."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qcompile.compiler.data.npz import Arrays
from qcompile.compiler.walk.extract import Piece
from qcompile.passes.observers.base import State
from qcompile.passes.observers.gram import Gram
from qcompile.runtime.sessions import run


class Opened:
    """A piece and its session, which is opened with the first run, and does not go along to another process."""

    def __init__(self, piece: Piece, provider: str, *, optimize: bool) -> None:
        self.piece, self.provider, self.optimize = piece, provider, optimize
        self.names = [str(output.name) for output in piece.proto.graph.output]
        self.inputs = {str(given.name) for given in piece.proto.graph.input}
        self._session: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_session": None}

    def run(self, feeds: Arrays) -> Arrays:
        """All outputs, in arrays of their own: one of ONNX Runtime's is a view that keeps the arena of its session."""
        if self._session is None:
            self._session = self.piece.session(self.provider, optimize=self.optimize)
        found = run(self._session, self.names, feeds)
        return {name: np.array(array) for name, array in zip(self.names, found, strict=True)}

    def watched(self, observers: Sequence[tuple[str, ...]], feeds: Sequence[Arrays]) -> list[State]:
        """What Gram observers of these activations saw of a unit of batches."""
        made = [Gram(*own, whole=True) for own in observers]
        for own in feeds:
            results = self.run(own)
            for observer in made:
                observer.update(results)
        return [observer.state() for observer in made]
