"""What a command said on stderr."""

import re

# As `compiler/console/terminal.Bar` writes where stderr is no terminal.
_PROGRESS = re.compile(r" *\d+ s  .*\n")


def complaints(err: str, *, notes: bool = True) -> str:
    """All but the lines of progress; without `notes`, what is no error is left out, too."""
    told = [line for line in err.splitlines(keepends=True) if not _PROGRESS.fullmatch(line)]
    return "".join(line for line in told if notes or not line.startswith("qcompile: note: "))
