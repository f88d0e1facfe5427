"""What a command found as one JSON document."""

import json
import math
from typing import Any


def strict(value: Any) -> Any:
    """A value as JSON has it: numpy's numbers as Python's, what JSON has no type for in words, null for NaN and inf."""
    if isinstance(value, dict):
        return {str(key): strict(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [strict(own) for own in value]
    if hasattr(value, "tolist"):  # numpy's numbers and arrays
        return strict(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, bool | int | str) or value is None else str(value)


def written(value: Any) -> str:
    """The document as text; every other character than ASCII is escaped."""
    return json.dumps(strict(value), indent=2, allow_nan=False)
