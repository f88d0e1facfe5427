"""Which segments a compile finishes."""

from typing import Any

import pytest

from qcompile.compiler.walk.checkpoints import Checkpoints


def finished_segments(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of segments, as they are finished."""
    done, after = list[int](), Checkpoints.after

    def counted(self: Checkpoints, state: Any, number: int, of: int, nodes: Any) -> None:
        done.append(number)
        after(self, state, number, of, nodes)

    monkeypatch.setattr(Checkpoints, "after", counted)
    return done
