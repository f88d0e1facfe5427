"""compiler/plan.py: from pass lists to passes, their order, their parameters, the specs of each kind of weight."""

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import onnx_ir as ir
import pytest

from qcompile.compiler.cli import main
from qcompile.compiler.plan import build, check_order, effective, make_policy, needs_calibration, planned
from qcompile.compiler.recipe import Recipe, Step, parse_passes
from qcompile.passes.contract import Fact
from qcompile.passes.errors import UserError
from qcompile.passes.extensions import parameters
from qcompile.passes.gptq import ErrorCompensated
from qcompile.passes.pack import Pack
from qcompile.passes.rounding import round_to_nearest, round_with_clip
from qcompile.passes.smooth import Smooth
from qcompile.passes.spec import ActivationSpec, PerChannel, PerGroup
from qcompile.passes.table import PASSES


def _build(passes: str, **settings: Any) -> list[Any]:
    return build(Recipe(passes=parse_passes(passes), **settings))


@pytest.mark.parametrize(
    ("passes", "built"),
    [
        ("pack", ["prepare", "pack"]),
        ("prepare", ["prepare"]),
        ("prepare,smooth", ["prepare", "smooth"]),
        ("smooth,awq,gptq,pack", ["prepare", "smooth", "awq", "gptq", "pack"]),
        ("awq,smooth,pack", ["prepare", "awq", "smooth", "pack"]),
        ("smooth,pack,fuse", ["prepare", "smooth", "pack", "fuse"]),
    ],
)
def test_prepare_comes_first_and_the_order_is_kept(passes: str, built: list[str]) -> None:
    assert [p.name for p in _build(passes, attention="plain")] == built


@pytest.mark.parametrize(
    ("passes", "settings", "there"),
    [
        ("pack", {}, True),
        ("smooth,pack,fuse", {"target": "matmulnbits"}, True),
        ("fuse_attention,pack", {}, True),
        ("pack", {"attention": "plain"}, False),
        ("pack", {"target": "qdq"}, False),
        ("pack(target=qdq)", {}, False),
        ("smooth,qdq", {}, False),
        ("smooth", {}, False),
    ],
)
def test_attention_is_fused_behind_packed_weights(passes: str, settings: dict[str, Any], there: bool) -> None:
    """Unless the recipe says otherwise, or its target has no operator for it."""
    assert [p.name for p in _build(passes, **settings)].count("fuse_attention") == there


@pytest.mark.parametrize(
    ("passes", "target", "built"),
    [
        ("pack", "qcompile", ["pack", "fuse(faster)", "fuse_attention"]),
        ("pack,fuse", "qcompile", ["pack", "fuse", "fuse_attention"]),
        ("pack,fuse_attention", "qcompile", ["pack", "fuse(faster)", "fuse_attention"]),
        ("pack,fuse_attention,fuse", "qcompile", ["pack", "fuse_attention", "fuse"]),
        ("pack", "matmulnbits", ["pack", "fuse_attention"]),
        ("pack", "qdq", ["pack"]),
    ],
)
def test_what_is_added_comes_in_the_order_of_the_table(passes: str, target: str, built: list[str]) -> None:
    found = _build(passes, target=target)[1:]
    assert [f"{own.name}(faster)" if getattr(own, "faster", False) else own.name for own in found] == built


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ("bias_correction", "pass 'bias_correction' must come after qdq"),
        ("gptq,fuse", "pass 'gptq' must be followed by pack or qdq or dynamic"),
    ],
)
def test_what_a_file_holds_serves_the_passes_that_need_it_alone(passes: str, message: str) -> None:
    held = frozenset({Fact.PACKED})
    for listed in ("fuse", "prepare,fuse", "fuse,fuse_attention"):
        assert "fuse" in [own.name for own in planned(Recipe(passes=parse_passes(listed)), held).passes]
    with pytest.raises(UserError, match=message):
        planned(Recipe(passes=parse_passes(passes)), held)


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ("quantize", rf"unknown pass 'quantize'; the passes are {', '.join(PASSES)}"),
        ("pack,pack", r"pass 'pack' is listed twice"),
        ("prepare(without=split_gem),pack", r"no small pass 'split_gem' to do without; did you mean 'split_gemms'"),
        ("prepare(without=1),pack", r"parameter without takes str, got 1"),
        ("smooth,prepare,pack", r"pass 'prepare' must come first"),
        ("pack,smooth", r"pass 'smooth' comes after 'pack'"),
        ("pack,smooth,fuse", r"pass 'smooth' comes after 'pack'"),
        ("fuse", r"pass 'fuse' must come after pack"),
        ("fuse,pack", r"pass 'fuse' must come after pack"),
        ("pack,fuse(bias=1)", r"parameter bias takes bool, got 1"),
        ("qdq,smooth", r"pass 'smooth' comes after 'qdq', where no float weights are left: move it before qdq"),
        ("pack,qdq", r"passes 'pack' and 'qdq' both quantize the weights: choose one"),
        ("qdq,pack", r"passes 'qdq' and 'pack' both quantize the weights: choose one"),
        ("qdq,fuse", r"pass 'fuse' must come after pack: add it to --passes before fuse"),
        ("dynamic,bias_correction", r"pass 'bias_correction' must come after qdq: add it to --passes before bias_c"),
        ("outlier", r"pass 'outlier' must be followed by pack or qdq or dynamic: add it to --passes after outlier"),
        ("awq,qdq", r"pass 'awq' must be followed by pack: add it to --passes after awq"),
        ("pack,gptq", r"pass 'gptq' must be followed by pack or qdq or dynamic: add it to --passes after gptq"),
        ("smooth,awq", r"pass 'awq' must be followed by pack"),
        ("gptq", r"pass 'gptq' must be followed by pack"),
        ("pack(size=3)", r"pass 'pack' has no parameter 'size'; it has target"),
        ("pack(target=gguf)", r"parameter target takes .*got 'gguf'"),
        ("fuse_attention,qdq", "'fuse_attention' and 'qdq' both need parts of attention to themselves: choose one"),
        ("qdq,fuse_attention,kv", "'qdq' and 'fuse_attention' both need parts of attention to themselves: choose one"),
        ("dynamic,fuse_attention", "'fuse_attention' comes after 'dynamic', where no parts of attention are left"),
        (
            "kv,fuse_attention",
            "'fuse_attention' comes after 'kv', where no parts of attention are left: move it before",
        ),
        ("kv,qdq", "'qdq' comes after 'kv', where no parts of attention are left: move it before kv"),
        ("smooth(alpha=high),pack", r"parameter alpha takes float or .*'auto'.*got 'high'"),
        ("smooth(alpha=2),pack", r"alpha must be 'auto' or a number from 0 to 1, got 2"),
        ("smooth(alpha=true),pack", r"parameter alpha takes"),
        ("awq(grid=true),pack", r"parameter grid takes int, got True"),
        ("awq(grid=2.5),pack", r"parameter grid takes int, got 2.5"),
        ("awq(grid=0),pack", r"grid must be at least 1, got 0"),
        ("gptq(refit=1),pack", r"parameter refit takes bool, got 1"),
    ],
)
def test_impossible_lists_are_told(passes: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _build(passes)


# Which lists make sense, told by names: the second way to say what follows from what passes declare.
BEHIND = {"awq": {"pack"}, "group_bits": {"pack"}}
BEHIND |= {"gptq": {"pack", "qdq", "dynamic"}, "outlier": {"pack", "qdq", "dynamic"}}
BEFORE = {"fuse": {"pack"}, "bias_correction": {"qdq"}}
QUANTIZING = {"pack", "qdq", "dynamic"}
ON_FLOATS = {"smooth", "equalize", "awq", "rotate", "gptq", "group_bits", "outlier"}


def _sensible(names: Sequence[str]) -> bool:
    quantizers = [i for i, name in enumerate(names) if name in QUANTIZING]
    return (
        "prepare" not in names[1:]
        and len(quantizers) <= 1
        and all(i < quantizers[0] for i, name in enumerate(names) if quantizers and name in ON_FLOATS)
        and all(BEHIND[name] & set(names[i:]) for i, name in enumerate(names) if name in BEHIND)
        and all(BEFORE[name] & set(names[:i]) for i, name in enumerate(names) if name in BEFORE)
        and not {"fuse_attention", "qdq"} <= set(names)
        and "fuse_attention" not in names[names.index("dynamic") if "dynamic" in names else len(names) :]
        and not {"fuse_attention", "qdq"} & set(names[names.index("kv") if "kv" in names else len(names) :])
    )


def test_lists_are_accepted_where_they_make_sense() -> None:
    """All lists of up to three passes, and of four behind `prepare`."""
    own = [kind.name for kind in PASSES.own()]
    lists = [names for count in (1, 2, 3) for names in permutations(own, count)]
    lists += [("prepare", *names) for names in permutations(own[1:], 4)]
    accepted = 0
    for names in lists:
        steps = [*([] if "prepare" in names else [Step("prepare")]), *map(Step, names)]
        try:
            check_order(steps)
        except UserError:
            assert not _sensible(names), names
        else:
            assert _sensible(names), names
            accepted += 1
    assert 50 < accepted < len(lists) / 4


def test_parameters_reach_the_pass() -> None:
    _, smooth, awq, gptq, *_ = _build("smooth(alpha=0.5),awq(insert_mul=true),gptq(damping=1e-3,sweeps=1),pack")
    assert isinstance(smooth, Smooth)
    assert smooth.alpha == 0.5
    assert awq.insert_mul is True
    assert gptq.rounding == ErrorCompensated(damping=1e-3, sweeps=1)


def test_the_seed_is_the_recipes_unless_given() -> None:
    assert [p.seed for p in _build("smooth,awq(seed=5),pack", seed=3)[1:3]] == [3, 5]


def test_the_target_of_pack_is_the_recipes() -> None:
    assert effective(Recipe(passes=parse_passes("smooth,pack(target=qdq)"))).target == "qdq"
    assert effective(Recipe(target="matmulnbits")).target == "matmulnbits"


def test_candidates_are_judged_by_the_rounding_that_follows() -> None:
    judged = _build("awq,gptq(damping=0.05),pack")[1].rounding
    assert judged == ErrorCompensated(damping=0.05, sweeps=0, refit=False)
    assert _build("awq,pack")[1].rounding is round_with_clip
    assert _build("smooth,qdq")[1].rounding is round_to_nearest
    assert _build("smooth,gptq,qdq")[1].rounding == ErrorCompensated(sweeps=0, refit=False)


def test_factors_are_for_the_activations_of_what_follows() -> None:
    for passes, grid in {
        "smooth,qdq(activations=uint16)": ActivationSpec(ir.DataType.UINT16),
        "smooth,qdq(provider=cuda)": ActivationSpec(ir.DataType.INT8, symmetric=True),
        "smooth,dynamic": ActivationSpec(),
        "smooth,pack": None,
    }.items():
        assert _build(passes)[1].activations == grid


def test_specs_of_each_kind_of_weight() -> None:
    policy = make_policy(Recipe(symmetric=True, group_size=64, lm_head=None, embedding=4))
    assert (policy.body.bits, policy.body.granularity, policy.body.symmetric) == (4, PerGroup(64), True)
    assert policy.lm_head is None
    assert policy.embedding is not None
    assert (policy.embedding.bits, policy.embedding.symmetric) == (4, False)
    assert make_policy(Recipe(group_size=0)).body.granularity == PerChannel(axis=1)


def test_8_bit_weights_have_zero_points_and_qdq_has_positive_scales() -> None:
    assert not make_policy(Recipe(bits=8, symmetric=True)).body.symmetric
    assert not make_policy(Recipe(symmetric=True, target="qdq")).body.signed_scale


def test_every_pass_tells_its_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes"]) == 0
    shown = capsys.readouterr().out
    for name, kind in PASSES.items():
        assert name in shown
        assert all(f"{parameter}=" in shown for parameter in parameters(kind))
        assert not kind.parts or f"{len(kind.parts)} small passes; `qcompile passes {name}` lists them" in shown
    assert issubclass(PASSES["pack"], Pack)
    assert len(shown.splitlines()) < 64, "the list is one to read"


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_is_told_alone_with_its_small_passes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes", name]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{name} ")
    assert all(f"{parameter}=" in shown for parameter in parameters(PASSES[name]))
    assert all(f" {part} " in shown for part in PASSES[name].parts)
    assert not any(line.split()[0] in PASSES for line in shown.splitlines()[1:])


def test_an_unknown_pass_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes", "packs"]) == 2
    assert "unknown pass 'packs'; the passes are prepare, " in capsys.readouterr().err


def test_every_pass_that_reads_calibration_data_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Statistics (smooth to outlier), ranges (qdq) or a walk of its own (bias_correction)."""
    assert main(["passes"]) == 0
    shown = capsys.readouterr().out.splitlines()
    told = {line.split()[0] for line in shown if "(needs calibration)" in line}
    assert {"smooth", "awq", "gptq", "outlier", "qdq", "bias_correction"} <= told
    assert not {"prepare", "pack", "fuse", "dynamic"} & told


def test_parameters_decide_whether_a_pass_reads_data() -> None:
    reads = {p.name: needs_calibration(p) for p in _build("outlier(source=norms),dynamic")}
    assert reads == {"prepare": False, "outlier": False, "dynamic": False}
    assert needs_calibration(_build("outlier,dynamic")[1])
