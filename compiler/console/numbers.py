"""Numbers in words."""

import math


def percent(share: float) -> str:
    """A share in tenths of a percent, never more than it is: 100.0 % is all."""
    return f"{int(1000 * share) / 10:.1f}%"


def megabytes(size: int) -> str:
    """A number of bytes as MB of a million, or KB below one."""
    return f"{size / 1e6:.1f} MB" if size >= 1_000_000 else f"{size / 1e3:.1f} KB"


def decibels(relative: float) -> float:
    """Signal over noise of a relative error."""
    return -20 * math.log10(relative) if relative else math.inf
