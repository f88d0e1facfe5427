"""compiler/settings/schema.py and `qcompile recipe`: what editors are told is what the reader of files takes."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from qcompile.compiler.cli import main
from qcompile.compiler.commands.recipe import recipe_schema
from qcompile.compiler.recipe import SETTINGS, Recipe
from qcompile.compiler.settings.schema import struct
from qcompile.passes.errors import UserError

MADE = struct(Recipe, "Recipe", formats="")
PUBLISHED = Path(__file__).parents[3] / "docs" / "recipe.schema.json"
GOOD: list[dict[str, Any]] = [
    {},
    Recipe().to_dict(),
    {"passes": "smooth,qdq", "lm_head": "keep", "exclude": "*head*", "keep_worst": 3, "keep_as": "weights"},
    {"passes": ["pack"], "weights": "nf4(group=16)", "embedding": 4, "min_coverage": "auto", "activations": 8},
    {"group_size": 0, "min_cosine": 1, "max_kl": 0.5, "seed": 7, "symmetric": True},
]
BAD = [
    {"bit": 4},
    {"bits": 5},
    {"bits": "4"},
    {"samples": 0},
    {"samples": True},
    {"context": 1.5},
    {"passes": 3},
    {"exclude": [1]},
    {"min_cosine": 2},
    {"max_kl": 0},
    {"target": "qd"},
    {"symmetric": 1},
    {"activations": "eight"},
    {"provider": None},
]


@pytest.mark.parametrize("plain", GOOD, ids=str)
def test_what_the_reader_takes_fits_the_schema(plain: dict[str, Any]) -> None:
    Recipe.from_dict(plain)
    msgspec.convert(plain, MADE)


@pytest.mark.parametrize("plain", BAD, ids=str)
def test_what_does_not_fit_the_schema_the_reader_refuses(plain: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(plain, MADE)
    with pytest.raises(UserError):
        Recipe.from_dict(plain)


def test_the_published_schema_is_the_one_of_the_declarations() -> None:
    """`qcompile recipe --schema > docs/recipe.schema.json` writes it."""
    assert json.loads(PUBLISHED.read_text(encoding="utf-8")) == recipe_schema()
    properties: Any = recipe_schema()["properties"]
    assert list(properties) == list(SETTINGS)
    assert all(own["description"] for own in properties.values())
    assert properties["samples"] == {
        "description": "calibration windows (default: 32)", "default": 32, "type": "integer", "minimum": 1,
        "maximum": 10**7,
    }  # fmt: skip


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == recipe_schema()
    file = tmp_path / "r.yaml"
    file.write_text("passes: [smooth, qdq]\nexclude: ['*head*']\n")
    assert main(["recipe", str(file)]) == 0
    told = yaml.safe_load(capsys.readouterr().out)
    assert Recipe.from_dict(told) == Recipe.from_dict({"passes": "smooth,qdq", "exclude": "*head*"})
    file.write_text("passes: [smoth, qdq]\n")
    assert main(["recipe", str(file)]) == 2
    assert "did you mean 'smooth'?" in capsys.readouterr().err
