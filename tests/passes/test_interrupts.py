"""passes/interrupts.py: Ctrl-C behind a block that loads modules, and after a destructor that it would be lost in."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from qcompile.passes.interrupts import heeded, uninterrupted


@pytest.fixture(autouse=True)
def _interrupted_by_python() -> Iterator[None]:
    """A background shell hands down that SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_waits_for_the_end_of_the_block() -> None:
    done = []

    def loading() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            done.append("all of it")

    with pytest.raises(KeyboardInterrupt):
        loading()
    assert done == ["all of it"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_handler_from_before_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            assert not heard
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [signal.SIGINT]


def test_other_threads_may_load_too() -> None:
    entered: list[bool] = []

    def enter() -> None:
        with uninterrupted():
            entered.append(True)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [True]


@pytest.mark.parametrize("milliseconds", [20, 60, 100, 140])
def test_onnxruntime_is_loaded_or_interrupted_but_never_broken(milliseconds: int) -> None:
    code = (
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGALRM, lambda *given: signal.raise_signal(signal.SIGINT))\n"
        "from qcompile.runtime import sessions\n"
        f"signal.setitimer(signal.ITIMER_REAL, {milliseconds / 1000})\n"
        "try:\n"
        "    sessions.ort_version()\n"
        "    signal.setitimer(signal.ITIMER_REAL, 0)\n"
        "    print('loaded')\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (done.stdout.strip() in ("loaded", "interrupted"), done.stderr) == (True, "")


class _Interrupted:
    """Ctrl-C comes while it is destroyed."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


class _Broken:
    def __del__(self) -> None:
        raise ValueError("a bug")


def test_an_interrupt_in_a_destructor_comes_again() -> None:
    lost, before = [], sys.unraisablehook

    def working() -> None:
        with heeded():
            _Interrupted()
            lost.append("it goes on")
            time.sleep(10)
            lost.append("to the end")

    with pytest.raises(KeyboardInterrupt):
        working()
    assert lost == ["it goes on"]
    assert sys.unraisablehook is before


def test_no_interrupt_comes_behind_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    other = []
    monkeypatch.setattr(sys, "unraisablehook", other.append)
    with heeded():
        _Broken()
        _Interrupted()
    time.sleep(0.2)
    assert [type(what.exc_value) for what in other] == [ValueError]
