"""The compiler: recipes, the pipeline, calibration, verification, reports and the command line.

`compile_model`, `Calibration`, `Recipe`, `parse_passes` and `custom_operators` can be imported from here.
"""

import importlib
from typing import Any

_HOMES = {
    "compile_model": "qcompile.compiler.pipeline",
    "Calibration": "qcompile.compiler.data.calibration",
    "Recipe": "qcompile.compiler.recipe",
    "parse_passes": "qcompile.compiler.recipe",
    "custom_operators": "qcompile.runtime.sessions",
}
__all__ = ["Calibration", "Recipe", "compile_model", "custom_operators", "parse_passes"]


def __getattr__(name: str) -> Any:
    """The public names, imported when first asked for: `qcompile --help` needs none of them."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
