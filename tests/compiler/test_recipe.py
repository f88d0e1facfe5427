"""compiler/recipe.py: pass lists and recipe files; every mistake is told, none is guessed away."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.compiler.commands.options import Common, Recipes, command, recipe_of
from qcompile.compiler.commands.parse import parse
from qcompile.compiler.recipe import (
    DATA,
    MIXED,
    SAFETY,
    SETTINGS,
    WHAT,
    WHICH,
    Recipe,
    Step,
    load_recipe,
    parse_passes,
    save_recipe,
)
from qcompile.compiler.settings.setting import Setting, table
from qcompile.passes.errors import UserError
from qcompile.passes.formats import FORMATS

WORDS = st.from_regex(r"[A-Za-z_][\w.-]{0,12}", fullmatch=True).filter(lambda w: w.isascii())
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
        ({"weights_of": "q_proj"}, r"weights_of: cannot read 'q_proj': expected PATTERN=FORMAT"),
        ({"weights_of": ["a=int8", "a =keep"]}, r"weights_of: 'a' is there twice"),
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


# --- what follows from each declaration -------------------------------------------------------------------------------

HEADINGS = (WHAT, WHICH, DATA, MIXED, SAFETY)


@command(*HEADINGS)
class All(Common, Recipes):
    """Every setting."""


_PATTERNS = st.lists(st.text("ab*[]./ ", min_size=1), min_size=1, max_size=3).map(tuple)


def _legal(own: Setting) -> st.SearchStrategy[Any]:
    """Values that a setting takes, by its declaration."""
    about, found = own.about, [st.sampled_from(own.choices)] if own.choices else []
    if own.name == "weights_of":
        formats = st.builds(Step, WORDS, st.dictionaries(WORDS, VALUES, max_size=2)) | st.just("keep")
        named = st.dictionaries(st.text("ab*[]./ ", min_size=1).filter(str.strip), formats, min_size=1, max_size=3)
        return named.map(lambda own: tuple(f"{pattern}={told}" for pattern, told in own.items()))
    if own.many:
        return st.lists(st.builds(Step, WORDS), min_size=1, max_size=3).map(tuple) if Step in own.kinds else _PATTERNS
    if type(None) in own.kinds:
        found.append(st.none())
    if Step in own.kinds:
        found.append(st.builds(Step, WORDS.filter(lambda word: word not in ("keep", "auto") and word[0].isalpha())))
    if bool in own.kinds:
        found.append(st.booleans())
    if not own.choices and int in own.kinds:
        ends = (about.least if about.least is not None else 1, about.most if about.most is not None else 10**6)
        found.append(st.integers(*map(int, ends)) | st.sampled_from([*about.besides, int(ends[0])]))
    if float in own.kinds:
        least = about.least if about.least is not None else 1e-9
        found.append(st.floats(least, about.most if about.most is not None else 1e9))
    if own.kinds == (str,) and not own.choices:
        found.append(st.sampled_from(["cpu", "cuda"]))
    return st.one_of(found)


@st.composite
def _recipes(draw: st.DrawFn) -> Recipe:
    """Recipes of any settings, but of those that exclude each other."""
    names = draw(st.lists(st.sampled_from(list(SETTINGS)), unique=True))
    given = {name: draw(_legal(SETTINGS[name])) for name in names}
    mixed = [name for name in ("keep_worst", "keep_share", "max_kl", "min_sqnr") if given.get(name) is not None]
    for name in mixed[1:] + (["bits", "symmetric"] if given.get("weights") else []):
        given.pop(name, None)
    if given.get("activations") == 8:
        given.pop("target", None)
    if not any(given.get(name) is not None for name in mixed):
        given.pop("keep_as", None)  # of no use then, and left out of files
    return Recipe(**given)


def _options(recipe: Recipe) -> list[str]:
    """The command line that says what differs from the defaults."""
    given = []
    for name, own in SETTINGS.items():
        value = own.plain(getattr(recipe, name))
        if value in (own.plain(own.default), None):
            continue
        if isinstance(value, bool):
            given.append(own.option if value else str(own.about.opposite and own.about.opposite[0]))
        elif isinstance(value, list) and name != "passes":
            given += [f"{own.option}={pattern}" for pattern in value]
        else:
            given.append(f"{own.option}={','.join(value) if isinstance(value, list) else value}")
    return given


@given(_recipes())
def test_files_dicts_and_options_say_the_same(recipe: Recipe) -> None:
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe_of(parse("compile", All, _options(recipe))) == recipe


@given(
    name=st.sampled_from(list(SETTINGS)),
    value=st.one_of(VALUES, st.none(), st.lists(VALUES, max_size=2), st.binary(max_size=3), st.floats()),
)
@settings(max_examples=200)
def test_a_value_is_taken_or_told_by_the_name_of_its_key(name: str, value: Any) -> None:
    """Nothing else comes of any plain value: no other exception, and no value that a file cannot hold."""
    own = {"bits": "weights are quantized", "group_size": "group size", "passes": "pass list"}
    told, made = "", Recipe()
    try:
        made = Recipe.from_dict({name: value}, "here")
    except UserError as error:
        told = str(error)
    assert told == "" or name in told or own[name] in told
    assert "\n" not in told
    assert Recipe.from_dict(made.to_dict() | {"keep_as": made.keep_as}) == made


def test_values_of_another_type_are_told_in_python_too() -> None:
    for given_, message in (
        ({"passes": 3}, "passes must be a list of names, got 3"),
        ({"passes": "smooth("}, "cannot read 'smooth('"),
        ({"weights": 4}, "weights must be str, got 4"),
        ({"samples": "3"}, "samples must be int, got '3'"),
        ({"exclude": 3}, "exclude must be a list of patterns"),
        ({"bits": 4.0}, "bits must be int, got 4.0"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            Recipe(**given_)
    assert Recipe(exclude=["*down*"]).to_dict()["exclude"] == ["*down*"]  # type: ignore[arg-type]


def test_texts_stand_in_python_for_what_they_do_in_a_file() -> None:
    for given_ in (
        {"passes": "smooth(alpha=0.5),qdq"},
        {"passes": ["smooth(alpha=0.5)", "qdq"]},
        {"weights": "nf4(group=16)", "lm_head": "keep", "embedding": "nf4"},
        {"exclude": "*down*", "activations": "auto", "min_coverage": "auto"},
    ):
        assert Recipe(**given_) == Recipe.from_dict(given_)  # type: ignore[arg-type]
    mixed: Any = ("smooth", Step("pack"))
    assert Recipe(passes=mixed) == Recipe.from_dict({"passes": "smooth,pack"})


def test_every_setting_has_an_option_and_its_row_in_the_documentation() -> None:
    assert {own.about.group for own in SETTINGS.values()} == set(HEADINGS)
    text = (Path(__file__).parents[2] / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert table(Recipe, formats=", ".join(own.name for own in FORMATS)) in text
    for own in SETTINGS.values():
        assert "{" not in own.told(formats="")


def test_readme_s_recipe_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(passes: .*?)```", text, re.DOTALL)
    (tmp_path / "r.yaml").write_text(block)
    assert load_recipe(tmp_path / "r.yaml") == Recipe(group_size=64, exclude=("*lm_head*",))
