"""JSON files that an option names: read whole, and what is wrong with them told in a line."""

import json
from pathlib import Path
from typing import Any

from qcompile.passes.errors import UserError

# Larger files are something else.
_LARGEST_FILE = 1 << 28


def read_json(path: Path, option: str, wanted: str) -> Any:
    """The plain values in a file. option: that named it; wanted: what it is to be, for who gave another one.

    Raises UserError for what is no regular file (reading a pipe may wait for ever), cannot be read, or is no JSON.
    """
    told = f"{option} {path}"
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{told} is not a regular file: give {wanted}")
        if path.stat().st_size > _LARGEST_FILE:
            raise UserError(f"{told} has over {_LARGEST_FILE} bytes: give {wanted}")
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{told} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # bad UTF-8 and JSON, and numbers of thousands of digits
        raise UserError(f"{told} is no JSON: give {wanted}") from error
