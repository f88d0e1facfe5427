"""The bookkeeping of a compile is linear in the layers: no function is called more than its share of times."""

import sys
import threading
from collections import Counter
from types import CodeType, FrameType
from typing import Any

import pytest

from qcompile.models.tiny import tiny_decoder
from qcompile.passes import routers

LISTS = ["smooth,outlier,qdq", "smooth,awq,gptq,pack,fuse", "outlier,dynamic"]
# Calls of the package's own code and of onnx_ir's, which loops over graphs run.
_COUNTED = ("qcompile", "onnx_ir")
# Functions that are called less often are no matter.
_OFTEN = 300


class Calls:
    """Counts Python calls by function, on this thread and those that begin within; unlike times they do not vary."""

    def __init__(self) -> None:
        self.counts: Counter[CodeType] = Counter()

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and str(frame.f_globals.get("__name__", "")).split(".")[0] in _COUNTED:
            self.counts[frame.f_code] += 1

    def __enter__(self) -> "Calls":
        threading.setprofile(self)
        sys.setprofile(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


def _calls(bench: Any, layers: int, passes: str) -> Counter[CodeType]:
    model = tiny_decoder(layers=layers, hidden=32, heads=2, kv_heads=1, ffn=64)
    path = bench.save(model, f"{layers}.onnx")
    with Calls() as calls:  # rows enough for smooth and outlier to act on every layer, not on what chance leaves them
        bench.compile(path, passes, output=f"out/{layers}.onnx", samples=8, context=32, min_cosine=0)
    return calls.counts


@pytest.mark.parametrize("passes", LISTS)
def test_calls_are_linear_in_the_layers(bench: Any, monkeypatch: pytest.MonkeyPatch, passes: str) -> None:
    """Four layers add to two at most what is twice what two add to one (four times, were it quadratic)."""
    monkeypatch.setattr(routers, "_WALKED", 4)  # a bound that so few layers would not meet
    _calls(bench, 1, passes)  # what a process does once counts for nothing
    one, two, four = (_calls(bench, layers, passes) for layers in (1, 2, 4))
    grown = {
        f"{code.co_filename}:{code.co_firstlineno} {code.co_qualname}": (one[code], two[code], count)
        for code, count in four.items()
        if count > _OFTEN and count - two[code] > 2.5 * (two[code] - one[code])
    }
    assert not grown, "\n".join(f"{where}: {counts}" for where, counts in grown.items())
