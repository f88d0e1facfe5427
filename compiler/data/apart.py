"""What a model was calibrated on is no test of it: files are told apart by their content, whatever they are called."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from qcompile.passes.errors import UserError


def digests(files: Iterable[Path]) -> dict[str, str]:
    """By the sha256 of its content, the name of each file that can be read."""
    found: dict[str, str] = {}
    for file in files:
        try:
            with open(file, "rb") as stream:
                found.setdefault(hashlib.file_digest(stream, "sha256").hexdigest(), file.name)
        except OSError:  # whoever reads its data says so
            continue
    return found


def check_apart(calibrated: Mapping[str, str], scored: Sequence[Path], model: str = "") -> None:
    """Raise UserError for a file that models are scored on and whose content is among that of `digests`."""
    for content, name in digests(scored).items() if calibrated else ():
        if content in calibrated:
            own = "" if calibrated[content] == name else f" (as {calibrated[content]})"
            told = f"{model} was calibrated on it{own}" if model else f"it is calibrated on{own}, too"
            raise UserError(f"{name} is no test data: {told}; give a file that calibration has not seen")


def calibrated_on(model: Path) -> dict[str, str]:
    """`digests` of the files that a compiled model was calibrated on, by the report beside it; empty without one."""
    try:
        plain = json.loads(model.with_name(f"{model.stem}.report.json").read_text(encoding="utf-8"))
        found = plain.get("calibrated")
    except (OSError, ValueError, RecursionError, AttributeError):
        return {}
    return {str(key): str(name) for key, name in found.items()} if isinstance(found, dict) else {}
