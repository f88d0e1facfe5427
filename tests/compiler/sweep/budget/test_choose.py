"""--budget: a model within it, whose formats follow from what each weight changes."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qcompile
from qcompile.compiler.api.rehearsal import rehearse
from qcompile.compiler.console.progress import Silent
from qcompile.compiler.data.calibration import Calibration
from qcompile.compiler.mixed.windows import check_windows
from qcompile.compiler.plan import make_policy
from qcompile.compiler.recipe import Recipe, parse_passes
from qcompile.compiler.results.report import Report
from qcompile.compiler.settings.amount import Amount
from qcompile.compiler.stages import gather_data, prepare_model
from qcompile.compiler.sweep.budget import prices
from qcompile.compiler.sweep.budget.allocate import Option, bytes_of
from qcompile.compiler.sweep.budget.choose import sized
from qcompile.compiler.sweep.budget.effects import errors, measured, probed
from qcompile.compiler.sweep.budget.rounded import PROBE
from qcompile.compiler.sweep.budget.units import find_units, joined
from qcompile.models.tiny import tiny_decoder
from qcompile.passes.errors import UserError
from qcompile.passes.linears import find_linears
from qcompile.passes.rounding import round_to_nearest
from qcompile.passes.spec import PerGroup, QuantSpec
from qcompile.runtime.sessions import session

VOCABULARY = 256
WIDTHS = (200_000, *range(5_000, 45_000, 1_000))


def _feeds(count: int = 8, length: int = 32) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    return [{"input_ids": random.integers(0, VOCABULARY, (1, length))} for _ in range(count)]


def _compiled(source: Path, folder: Path, budget: str, **fields: Any) -> Report:
    return qcompile.compile(
        source, fields.pop("passes", "pack"), output=folder / "o.onnx", calibration=_feeds(), budget=budget, **fields
    )


@pytest.mark.parametrize("budget", ["110kb", "120kb", "140kb"])
def test_bytes_of_the_output_are_within_the_budget(source: Path, tmp_path: Path, budget: str) -> None:
    """Of all its files that a session reads; and all is used but for what a rehearsal does not know: 16 KB."""
    report = _compiled(source, tmp_path, budget)
    size = sum((tmp_path / name).stat().st_size for name in report.files if ".report." not in name)
    allowed = float(budget[:-2]) * 1e3
    assert allowed - 32e3 < size <= allowed
    assert report.target[0].startswith(f"budget {float(budget[:-2]) / 1e3:g} MB: ")


@pytest.mark.parametrize("size", range(4_100_000, 7_000_000, 400_000))
def test_bytes_that_formats_add_leave_nothing_over(size: int) -> None:
    """Those of functions, of each format that some weight has."""
    cases = [("int3", 3.0, 64.0), ("int4", 4.0, 16.0), ("int5", 5.0, 4.0), ("int6", 6.0, 1.0)]
    options = [[Option(name, width * bits, width * cost) for name, bits, cost in cases] for width in WIDTHS]

    def size_of(made: Sequence[Option[str]]) -> int:
        return round(bytes_of(made) + 150_000 * len({own.what for own in made}))

    made = sized(options, size, Amount(size=size), [1] * len(options), size_of)
    assert 0.98 * size < size_of(made) <= size


def test_a_tied_table_counts_once_in_every_format(tmp_path: Path) -> None:
    """Where the file stores it once: a dry run tells its size, which a budget of bytes goes by."""
    ir.save(tiny_decoder(vocab=2048), tmp_path / "m.onnx")
    for own in ("int3", "int4", "int5", "int6", "int8"):
        recipe = Recipe(parse_passes("pack"), weights_of=(f"*={own}(group=64)",))
        report = qcompile.compile(tmp_path / "m.onnx", recipe=recipe, output=tmp_path / f"{own}.onnx", verify="sample")
        plan = rehearse(tmp_path / "m.onnx", recipe)
        assert plan.report.compiled_bytes == pytest.approx(report.compiled_bytes, abs=16_000), own


@pytest.mark.parametrize("budget", ["4bpw", "5.5bpw"])
def test_bits_a_weight_are_within_the_budget(source: Path, tmp_path: Path, budget: str) -> None:
    report = _compiled(source, tmp_path, budget)
    assert report.bits_per_weight is not None
    assert float(budget[:-3]) - 0.5 < report.bits_per_weight <= float(budget[:-3])


def test_weights_that_change_more_get_more_bits(tmp_path: Path) -> None:
    """A product whose output hardly counts has the fewest bits, all others more."""
    model = tiny_decoder(outliers=False)
    quiet = {own.name: own for own in find_linears(model.graph)}["model.layers.1.mlp.down_proj"]
    assert quiet.weight.const_value is not None
    array = quiet.weight.const_value.numpy() * np.float32(1e-3)
    quiet.weight.const_value = ir.tensor(array, name=quiet.weight.name)
    ir.save(model, tmp_path / "m.onnx")
    report = _compiled(tmp_path / "m.onnx", tmp_path, "4.6bpw")
    formats = {own.node: own.format for own in report.decisions["pack"]}
    assert formats["model.layers.1.mlp.down_proj"] == "int3"
    assert sum(own in ("int4", "int5", "int6", "int8") for own in formats.values()) > len(formats) // 2


def test_products_of_one_input_stay_together(source: Path, tmp_path: Path) -> None:
    """And a table that the head is tied to has the format of the head."""
    formats = {own.node: own.format for own in _compiled(source, tmp_path, "4.2bpw").decisions["pack"]}
    for layer in range(2):
        q, k, v = (formats[f"model.layers.{layer}.self_attn.{name}_proj"] for name in "qkv")
        assert q == k == v
        assert formats[f"model.layers.{layer}.mlp.gate_proj"] == formats[f"model.layers.{layer}.mlp.up_proj"]
    assert formats["lm_head"] == formats["model.embed_tokens"]


def test_what_the_user_says_stays(source: Path, tmp_path: Path) -> None:
    given = {"weights_of": ["*q_proj*=int8"], "exclude": ["*layers.1.mlp*"], "lm_head": "keep", "embedding": "keep"}
    report = _compiled(source, tmp_path, "4.5bpw", min_coverage=0, **given)
    formats = {own.node: own.format or own.action for own in report.decisions["pack"]}
    assert {formats[f"model.layers.{layer}.self_attn.q_proj"] for layer in range(2)} == {"int8"}
    assert {told for name, told in formats.items() if "layers.1.mlp" in name or name == "lm_head"} == {"kept"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": "2.1bpw"}, "budget 2.1 bits a weight is too small: with the smallest format of each weight it "),
        ({"budget": "20kb"}, "budget 0.02 MB is too small: with the smallest format of each weight it takes 9"),
        ({"budget": "4bpw", "passes": "smooth,qdq"}, "a budget is for the weights of pack.*: min_sqnr and keep_worst"),
        ({"budget": "4bpw", "passes": "prepare"}, "a budget is for the weights of pack.*: add pack"),
        ({"budget": "4bpw", "exclude": ["*"], "min_coverage": 0}, "a budget has nothing to choose"),
        ({"budget": "much"}, "cannot read budget 'much'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told(source: Path, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _compiled(source, tmp_path, **fields)
    assert not list(tmp_path.iterdir())


def test_the_same_budget_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        _compiled(source, tmp_path / name, "115kb", passes="smooth,awq,gptq,pack")
    a, b = ((tmp_path / name / "o.onnx").read_bytes() for name in ("a", "b"))
    assert a == b


def test_the_probe_is_read_everywhere_and_the_model_is_left_as_it_was(source: Path) -> None:
    model = ir.load(source)
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    units = find_units(model, make_policy(Recipe(parse_passes("pack"))))
    clone = probed(model, units)
    names = {name for unit in units for name in unit.names}
    for node in clone.graph:
        assert any(".probed." in str(v.name) for v in node.inputs if v is not None) == (node.name in names)
    assert {name: value.const_value for name, value in model.graph.initializers.items()} == before


def test_errors_fall_by_the_step_of_a_grid(source: Path) -> None:
    units = find_units(ir.load(source), make_policy(Recipe(parse_passes("pack"))))
    grids = [QuantSpec(bits, PerGroup(64)) for bits in (3, 4, 5, 6)]
    for unit in units:
        three, four, five, six = errors(unit, [[grid] * len(unit.sites) for grid in grids], rotated=False)
        assert three == pytest.approx(1)
        assert three / 6 < four * 1.2 < three
        assert six < five < four


def test_sets_are_joined_by_what_they_share() -> None:
    assert joined([{1}, {2}, {1, 3}, {4}, {3, 2}]) == [[0, 1, 2, 4], [3]]
    assert joined([]) == []
    assert joined([{1}, {2}]) == [[0], [1]]


def _told_bits(report: Report) -> float:
    return float(report.target[0].partition(": ")[2].partition(" ")[0])


@pytest.mark.parametrize("target", ["qcompile", "matmulnbits", "qdq", "qnn"])
@pytest.mark.parametrize("embedding", [8, "keep", "int4(group=32)"])
def test_targets_get_formats_that_they_have(source: Path, tmp_path: Path, target: str, embedding: str | int) -> None:
    """Of a tied head, too, whose table has zero points for all targets."""
    given = {"target": target, "embedding": embedding, "min_coverage": 0, "attention": "plain"}
    report = _compiled(source, tmp_path, "5bpw", **given)
    formats = {own.node: own.format or own.action for own in report.decisions["pack"]}
    assert set(formats.values()) <= {"int3", "int4", "int5", "int6", "int8", "kept"}
    if target in ("matmulnbits", "qnn"):
        assert set(formats.values()) <= {"int4", "int8", "kept"}
    assert formats["model.embed_tokens"] == {8: formats["lm_head"], "keep": "kept"}.get(embedding, "int4")
    assert _told_bits(report) <= 5


@pytest.mark.parametrize(("passes", "some"), [("pack", False), ("rotate(judge=false),pack", True)])
def test_pairs_are_for_turned_inputs(source: Path, tmp_path: Path, passes: str, some: bool) -> None:
    """Of products; a table that is read by its rows is never turned."""
    report = _compiled(source, tmp_path, "3.7bpw", passes=passes)
    formats = {own.node: own.format for own in report.decisions["pack"]}
    assert any(own.startswith("pairs") for own in formats.values()) == some
    assert not formats["model.embed_tokens"].startswith("pairs")
    assert ("pairs take up to int8's time" in report.target[0]) == some


def test_a_group_size_that_is_no_weight_s_is_not_refused(source: Path, tmp_path: Path) -> None:
    """Formats have their own; what says the format of some weights has the one that is given."""
    given = {"target": "matmulnbits", "group_size": 48, "min_coverage": 0}
    with pytest.warns(UserWarning, match="group_size has no effect here"):
        report = _compiled(source, tmp_path, "5bpw", **given)
    assert {own.told for own in report.decisions["pack"]} <= {
        f"int{b} g{g} asym" for b in (4, 8) for g in (32, 64, 128)
    }
    with pytest.raises(UserError, match="target matmulnbits takes group sizes 16, 32, 64"):
        _compiled(source, tmp_path, "5bpw", **given, lm_head=4)


def test_a_target_of_one_format_has_group_sizes_to_choose(source: Path, tmp_path: Path) -> None:
    report = _compiled(source, tmp_path, "4.8bpw", target="tensorrt", min_coverage=0)
    made = {own.told for own in report.decisions["pack"] if own.format}
    assert len(made) > 1
    assert all(own.startswith("int4") for own in made)


def test_a_target_of_one_choice_has_nothing_to_choose(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prices.lists, "CANDIDATES", ("int4(group=64)", "int6(group=64)"))
    with pytest.raises(UserError, match="nothing to choose: of its formats target tensorrt has int4 alone"):
        _compiled(source, tmp_path, "5bpw", target="tensorrt", min_coverage=0)


@pytest.mark.parametrize(
    ("dtype", "fields"),
    [("fp32", {}), ("fp16", {}), ("fp32", {"scale_bits": 16}), ("fp16", {"scale_bits": 16}),
     ("fp32", {"scale_bits": 16, "target": "qdq"}), ("fp32", {"target": "qdq"}), ("fp32", {"symmetric": True})],
)  # fmt: skip
def test_the_bits_that_are_told_are_those_of_the_file(tmp_path: Path, dtype: str, fields: dict[str, Any]) -> None:
    """Scales have the type that the file gives them, each weight its own."""
    ir.save(tiny_decoder(dtype=dtype), tmp_path / "m.onnx")
    report = _compiled(tmp_path / "m.onnx", tmp_path, "5.2bpw", **fields)
    assert report.bits_per_weight == pytest.approx(_told_bits(report), abs=0.006)


def test_of_a_unit_only_the_named_weight_leaves(source: Path, tmp_path: Path) -> None:
    report = _compiled(source, tmp_path, "4bpw", weights_of=["*layers.0*q_proj*=int8(group=32)"])
    formats = {own.node: own.told for own in report.decisions["pack"]}
    q, k, v = (formats[f"model.layers.0.self_attn.{name}_proj"] for name in "qkv")
    assert q == "int8 g32 asym"
    assert k == v
    assert "g64" in k


@pytest.mark.parametrize("given", [{"lm_head": 4}, {"embedding": "int4(group=32)"}, {"weights_of": ["lm_head=int6"]}])
def test_what_shares_a_weight_with_what_is_said_is_not_chosen(
    source: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    """The head and the table are tied: one is said, the other has what it has without a budget."""
    report = _compiled(source, tmp_path, "4.4bpw", **given)
    plain = qcompile.compile(source, "pack", output=tmp_path / "p.onnx", calibration=_feeds(), **given)
    for node in ("lm_head", "model.embed_tokens"):
        own, wanted = ({d.node: d.told for d in made.decisions["pack"]}[node] for made in (report, plain))
        assert own == wanted


def test_a_change_that_is_told_is_that_of_running_the_unit_alone(source: Path) -> None:
    recipe = Recipe(parse_passes("smooth,qdq"), keep_worst=1)
    prepared = prepare_model(source, recipe, Silent())
    data = gather_data(prepared, Calibration(reader=_feeds()))
    units = find_units(prepared.model, make_policy(Recipe(parse_passes("pack"))))
    ranking = measured(prepared, data, units, Silent())
    batches, _ = check_windows(prepared.plan, data)
    floats = [_logits(ir.load(source), batch.feeds) for batch in batches]
    for unit, found in zip(units, ranking.nodes, strict=True):
        model = ir.load(source)
        weights = {own.name: own for own in find_linears(model.graph)}
        for linear in unit.linears:
            own = weights[linear.name]
            rounded = round_to_nearest(own.read(), PROBE, None).dequantize()
            stored = np.ascontiguousarray(rounded.T if own.transposed else rounded)
            own.weight.const_value = ir.tensor(stored, name=own.weight.name)
        changed = [_logits(model, batch.feeds) for batch in batches]
        kl = np.concatenate([_kl(a, b) for a, b in zip(floats, changed, strict=True)]).mean()
        assert found.effect == pytest.approx(kl, rel=1e-3, abs=1e-7)


def _logits(model: ir.Model, feeds: dict[str, Any]) -> np.ndarray[Any, Any]:
    (made,) = session(ir.to_proto(model).SerializeToString(), kernels="portable").run(["logits"], feeds)
    return np.asarray(made, np.float64).reshape(-1, VOCABULARY)


def _kl(known: np.ndarray[Any, Any], made: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    p, q = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True) for logits in (known, made))
    return np.asarray((np.exp(p) * (p - q)).sum(axis=1))


def test_a_function_that_gives_data_is_named_in_commands(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is called once, and what it gave is read several times."""
    (tmp_path / "given_feeds.py").write_text(
        "import numpy as np\ncalls = []\ndef made():\n    calls.append(1)\n"
        "    return [{'input_ids': np.full((1, 32), i)} for i in range(8)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    report = qcompile.compile(
        source, "pack", output=tmp_path / "o.onnx", calibration="given_feeds:made", budget="120kb"
    )
    assert report.given == ["--calibration", "given_feeds:made"]
    assert importlib.import_module("given_feeds").calls == [1]
