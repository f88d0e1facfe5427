"""compiler/sweep/grid.py: values, combinations, what is refused at once and what is a row with its reason."""

from dataclasses import replace
from pathlib import Path

import pytest

from qcompile.compiler.recipe import Recipe, parse_passes
from qcompile.compiler.sweep.grid import combinations, identity, parse_grid
from qcompile.passes.errors import UserError

PACK = Recipe(passes=parse_passes("pack"))


def test_lists_have_semicolons_and_all_else_commas() -> None:
    grid = parse_grid(
        ["bits=4,8", "passes=pack;smooth,awq(grid=4, clip=false),pack", "calibration=a.txt+b.txt,general"]
    )
    assert grid == {
        "bits": ("4", "8"),
        "passes": ("pack", "smooth,awq(grid=4, clip=false),pack"),
        "calibration": ("a.txt+b.txt", "general"),
    }


def test_every_combination_is_made_over_the_base() -> None:
    base = replace(PACK, samples=3)
    grid = parse_grid(
        ["bits=4,8", "group_size=channel,64", "symmetric=yes,no", "lm_head=keep", "exclude=*up*,*q*;none"]
    )
    made = combinations(grid, base, ["base.txt"])
    assert len(made) == 16
    first, last = made[0], made[-1]
    assert first.values == {
        "bits": "4",
        "group_size": "channel",
        "symmetric": "yes",
        "lm_head": "keep",
        "exclude": "*up*,*q*",
    }
    expected = replace(base, bits=4, group_size=0, symmetric=True, lm_head=None, exclude=("*up*", "*q*"))
    assert (first.recipe, first.calibration) == (expected, ("base.txt",))
    assert last.recipe == replace(base, bits=8, group_size=64, lm_head=None)


def test_python_values_are_those_of_the_command_line() -> None:
    plain = {"bits": [4, 8], "group_size": [0, 64], "symmetric": [True, False], "exclude": [["*up*"], []]}
    text = parse_grid(["bits=4,8", "group_size=channel,64", "symmetric=yes,no", "exclude=*up*;none"])
    assert combinations(plain, PACK) == combinations(text, PACK)


def test_calibration_alternatives() -> None:
    made = combinations({"calibration": ["a.txt", "b.npz+c.npz", ["general", "a.txt"], "self"]}, PACK, ["base.txt"])
    assert [one.calibration for one in made] == [("a.txt",), ("b.npz", "c.npz"), ("general", "a.txt"), ("self",)]


def test_a_plus_in_a_file_s_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c++.txt").touch()
    made = combinations({"calibration": ["c++.txt", "general+c++.txt+a.txt"]}, PACK)
    assert [one.calibration for one in made] == [("c++.txt",), ("general", "c++.txt", "a.txt")]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["bits"], "cannot read 'bits'"),
        (["bits=4,,8"], "cannot read 'bits=4,,8'"),
        (["passes=pack;"], "cannot read 'passes=pack;'"),
        (["calibration=a.txt;b.txt"], "has semicolons: commas part its values"),
        (["bits=4", "bits=8"], "bits is given twice"),
        (["bit=4"], "unknown key 'bit'; known keys are passes, bits"),
        (["bits=4,5"], "bits=5 is never possible: weights are quantized to 4 or 8 bits, got 5"),
        (["bits=four"], "bits=four is never possible: .*must be int, got 'four'"),
        (["symmetric=maybe"], "symmetric=maybe is never possible"),
        (["group_size=32,3"], "group_size=3 is never possible: group size 3 is not possible"),
        (["group_size={"], "group_size cannot be '{'"),
        (["passes=pack;smoth,pack"], "passes=smoth,pack is never possible: unknown pass 'smoth'"),
        (["passes=smooth(alfa=1),pack"], "has no parameter 'alfa'"),
        (["passes=gptq"], "must be followed by pack"),
    ],
)  # fmt: skip
def test_a_bad_grid_is_refused_before_anything_runs(items: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        combinations(parse_grid(items), Recipe())


def test_settings_that_exclude_each_other_are_a_row_with_its_reason() -> None:
    made = combinations(parse_grid(["activations=8,16", "target=qcompile,matmulnbits"]), PACK)
    reasons = {(one.values["activations"], one.values["target"]): one.reason for one in made}
    assert reasons.pop(("8", "matmulnbits")).startswith("activations 8 needs target qcompile")
    assert set(reasons.values()) == {""}
    assert [one.recipe is None for one in made] == [False, True, False, False]


def test_symmetry_decides_nothing_at_8_bits() -> None:  # identity, Case 1
    assert identity(replace(PACK, bits=8, symmetric=True), "a") == identity(replace(PACK, bits=8), "a")
    assert identity(replace(PACK, symmetric=True), "a") != identity(PACK, "a")


@pytest.mark.parametrize("passes", ["pack", "dynamic", "outlier(source=norms),dynamic"])
def test_data_decide_nothing_where_no_pass_reads_them(passes: str) -> None:  # identity, Case 2
    recipe = replace(PACK, passes=parse_passes(passes))
    assert identity(replace(recipe, samples=3, context=9), "a") == identity(recipe, "b")
    assert identity(replace(recipe, seed=1), "a") != identity(recipe, "a")


@pytest.mark.parametrize(
    ("passes", "settings"),
    [
        ("smooth,pack", {}),  # statistics
        ("qdq", {}),  # ranges
        ("qdq,bias_correction", {}),  # means
        ("outlier,dynamic", {}),
        ("dynamic", {"keep_worst": 1}),  # sensitivities
    ],
)
def test_data_decide_where_they_are_read(passes: str, settings: dict[str, int]) -> None:  # identity, Case 2
    recipe = replace(PACK, passes=parse_passes(passes), **settings)
    assert identity(recipe, "a") != identity(recipe, "b")
    assert identity(replace(recipe, samples=3), "a") != identity(recipe, "a")
    assert identity(replace(recipe, context=9), "a") != identity(recipe, "a")
