"""Under whose terms a model is: the files that say so in its folder."""

from pathlib import Path

# How their names begin.
_NAMES = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY", "TERMS_OF_USE", "GEMMA_TERMS")


def licence_files(folder: Path) -> list[Path]:
    """Licences, terms and notices in a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.name.upper().startswith(_NAMES) and path.is_file())
