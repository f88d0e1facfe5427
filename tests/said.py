"""What a command said on stderr."""

import re

# As `compiler/console/terminal.Bar` writes where stderr is no terminal.
_PROGRESS = re.compile(r" *\d+ s  .*\n")


def complaints(err: str) -> str:
    """All but the lines of progress."""
    return "".join(line for line in err.splitlines(keepends=True) if not _PROGRESS.fullmatch(line))
