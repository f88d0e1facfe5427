"""compiler/recipe.py: pass lists and recipe files; every mistake is told, none is guessed away."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.compiler.recipe import Recipe, Step, load_recipe, parse_passes, save_recipe
from qcompile.passes.errors import UserError

WORDS = st.from_regex(r"[A-Za-z_][\w-]{0,12}", fullmatch=True).filter(lambda w: w.isascii())
# Words that read as numbers or truth values are not words any more.
VALUES = st.one_of(
    st.booleans(),
    st.integers(-(10**9), 10**9),
    st.floats(allow_nan=False, allow_infinity=False),
    WORDS.filter(lambda w: w.lower() not in ("true", "false", "nan", "inf", "infinity")),
)
STEPS = st.lists(st.builds(Step, WORDS, st.dictionaries(WORDS, VALUES, max_size=3)), min_size=1, max_size=5)
TUNED = Recipe(
    passes=parse_passes("smooth(alpha=0.5),awq(clip=false),pack"),
    bits=8,
    group_size=64,
    symmetric=True,
    target="qdq",
    lm_head=None,
    embedding=4,
    include=("layer.*", "head"),
    exclude=("*down*",),
    samples=3,
    context=9,
    min_coverage=0.25,
    seed=7,
    provider="cuda",
)


@given(STEPS)
def test_pass_lists_round_trip(steps: list[Step]) -> None:
    text = ",".join(map(str, steps))
    parsed = parse_passes(text)
    assert parsed == tuple(steps)
    assert [[type(v) for v in s.parameters.values()] for s in parsed] == [
        [type(v) for v in s.parameters.values()] for s in steps
    ]


@pytest.mark.parametrize(
    ("text", "name", "parameters"),
    [
        ("pack", "pack", {}),
        (" pack ( ) ", "pack", {}),
        ("gptq(damping=1e-3, refit=False)", "gptq", {"damping": 1e-3, "refit": False}),
        ("smooth(alpha=auto)", "smooth", {"alpha": "auto"}),
        ("awq(grid=12,clip=true)", "awq", {"grid": 12, "clip": True}),
    ],
)
def test_one_step(text: str, name: str, parameters: dict[str, Any]) -> None:
    (step,) = parse_passes(text)
    assert (step.name, dict(step.parameters)) == (name, parameters)


@pytest.mark.parametrize(
    "text", ["", "smooth,,pack", "pack(", "pack)", "pack(target)", "pack(target=)", "pack(=qdq)", "a b", "pack(x=(1))"]
)
def test_pass_lists_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UserError, match="cannot read"):
        parse_passes(text)


@pytest.mark.parametrize("recipe", [Recipe(), TUNED], ids=["default", "tuned"])
def test_yaml_round_trip(tmp_path: Path, recipe: Recipe) -> None:
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_toml_and_yaml_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(
        'passes = ["smooth(alpha=0.5)", "awq(clip=false)", "pack"]\nbits = 8\ngroup_size = 64\nsymmetric = true\n'
        'target = "qdq"\nlm_head = "keep"\nembedding = 4\ninclude = ["layer.*", "head"]\nexclude = "*down*"\n'
        'samples = 3\ncontext = 9\nmin_coverage = 0.25\nseed = 7\nprovider = "cuda"\n'
    )
    assert load_recipe(tmp_path / "r.toml") == TUNED
    (tmp_path / "r.yml").write_text("passes: smooth,pack\n")
    assert load_recipe(tmp_path / "r.yml") == Recipe(passes=parse_passes("smooth,pack"))


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"bitz": 4}, r"unknown key 'bitz'; known keys are passes, bits"),
        ({"bits": "4"}, r"bits must be int, got '4'"),
        ({"bits": True}, r"bits must be int, got True"),
        ({"samples": True}, r"samples must be int, got True"),
        ({"lm_head": True}, r"lm_head must be int, got True"),
        ({"symmetric": 1}, r"symmetric must be bool, got 1"),
        ({"min_coverage": "all"}, r"min_coverage must be int or float, got 'all'"),
        ({"exclude": 3}, r"exclude must be a list of patterns, got 3"),
        ({"include": ["a", 3]}, r"include must be a list of patterns"),
        ({"bits": 3}, r"4 or 8 bits, got 3"),
        ({"lm_head": 5}, r"lm_head takes 4, 8, a weight format or keep, got 5"),
        ({"group_size": 7}, r"group size 7 is not possible"),
        ({"group_size": -1}, r"group size -1 is not possible"),
        ({"target": "gguf"}, r"unknown target 'gguf'; choose one of qcompile, matmulnbits, qdq"),
        ({"min_coverage": 1.5}, r"between 0 and 1, got 1.5"),
        ({"samples": 0}, r"samples must be at least 1"),
        ({"context": 1}, r"context at least 2"),
    ],
)
def test_mistakes_are_told(plain: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recipe.from_dict(plain)


@pytest.mark.parametrize(
    ("name", "text"),
    [("r.yaml", "bits: [4"), ("r.toml", "bits = "), ("r.yaml", "- pack"), ("r.yaml", ""), ("missing.yaml", None)],
)
def test_files_that_are_no_recipes(tmp_path: Path, name: str, text: str | None) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name}.*(cannot be read|must be a table)"):
        load_recipe(tmp_path / name)
