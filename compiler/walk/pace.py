"""How a walk goes on, in a line: segments done, seconds a segment, memory. The time left is the bar's to tell."""

import time

import psutil


class Pace:
    """Of a walk through so many segments, of which some were finished before it began."""

    def __init__(self, segments: int, done: int) -> None:
        self._segments, self._first, self._begun = segments, done, time.monotonic()

    def told(self, done: int) -> str:
        """The segment that comes next, and how the ones before it went."""
        line = f"segment {done + 1} of {self._segments}"
        if done == self._first:
            return line
        each = (time.monotonic() - self._begun) / (done - self._first)
        return f"{line}, {each:.3g} s each, {psutil.Process().memory_info().rss / 1e9:.1f} GB"
