"""A hook of mkdocs: the last section of the navigation holds all pages of benchmarks/, their headings as titles."""

from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """Fill the section: README.md first, then the others by name."""
    root = Path(config["docs_dir"])
    first = root / "benchmarks" / "README.md"
    pages = sorted(root.glob("benchmarks/**/*.md"), key=lambda page: (page != first, page))
    section = next(entry for entry in config["nav"] if "Measured" in entry)
    section["Measured"] = [page.relative_to(root).as_posix() for page in pages]
    return config
