"""Packages beside qcompile, as pip leaves them."""

import tomllib
from pathlib import Path


def install(folder: Path, files: dict[str, str]) -> Path:
    """A package as pip leaves it: its modules, and a dist-info with what pyproject.toml says. Returns the folder."""
    project = tomllib.loads(files["pyproject.toml"])["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    lines = [
        line
        for group, entries in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in entries.items()), "")
    ]
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    written = {f"{info.name}/METADATA": metadata, f"{info.name}/entry_points.txt": "\n".join(lines)}
    for name, content in (files | written).items():
        if name != "pyproject.toml":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content, encoding="utf-8")
    return folder
