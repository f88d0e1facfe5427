"""Ctrl-C where it would get lost: while native modules are loaded, and where Python drops exceptions."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Seconds behind which a lost interrupt comes again, when whatever lost it has ended.
_MOMENT = 0.05


@contextmanager
def heeded() -> Iterator[None]:
    """Have an interrupt come again that was raised in a destructor or in a callback of native code: Python reports what
    is raised there, and goes on.
    """
    before, timers = sys.unraisablehook, list[threading.Timer]()

    def dropped(what: "sys.UnraisableHookArgs") -> None:
        if not isinstance(what.exc_value, KeyboardInterrupt):
            before(what)
            return
        timers.append(threading.Timer(_MOMENT, signal.raise_signal, [signal.SIGINT]))
        timers[-1].daemon = True
        timers[-1].start()

    sys.unraisablehook = dropped
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in timers:
            timer.cancel()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put an interrupt (SIGINT) off until the block has ended, at most once; for imports, which take a moment, and in
    which native modules turn KeyboardInterrupt into an ImportError.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    came: list[Any] = []
    signal.signal(signal.SIGINT, lambda *given: came.append(given))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)
