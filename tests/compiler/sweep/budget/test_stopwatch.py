"""Products timed here: each stored as a compile stores it, once for a machine."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompile.compiler.cli import main
from qcompile.compiler.console.progress import Silent
from qcompile.compiler.plan import make_policy
from qcompile.compiler.recipe import Recipe
from qcompile.compiler.results.timings import FLOAT, Product, Timings
from qcompile.compiler.sweep.budget import stopwatch
from qcompile.compiler.sweep.budget.stopwatch import timed
from qcompile.passes.affine import Grid
from qcompile.passes.errors import UserError
from qcompile.passes.threads import limited
from qcompile.runtime.sessions import session


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "timings"


def _grid(form: str, target: str = "qcompile") -> Grid:
    return make_policy(Recipe(passes="pack", weights=form, target=target)).body  # type: ignore[arg-type]


def _products(k: int = 64, n: int = 96) -> dict[Product, Grid | None]:
    grids = {form: _grid(form) for form in ("int3(group=64)", "int4(group=32)", "int8(group=64)")}
    return {Product(k, n, FLOAT): None, **{Product(k, n, str(own)): own for own in grids.values()}}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "_MOST_ROUNDS", 2)


def test_products_are_timed_once_for_a_machine(cache: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other products all are measured anew, since one measurement compares; other threads are another machine, and
    what another version stores is another product."""
    products = _products()
    with limited(1):
        assert not timed(products, "qcompile", 1, Silent(), measure=False).times
        first = timed(products, "qcompile", 1, Silent())
        assert set(first.times) == set(products)
        assert all(0 < own < 1e6 for own in first.times.values())
        asked = list[Any]()

        def never(wanted: Mapping[Product, Any], *_: Any) -> dict[Product, float]:
            asked.append(set(wanted))
            return dict.fromkeys(wanted, 7.0)

        monkeypatch.setattr(stopwatch, "_measured", never)
        assert timed(products, "qcompile", 1, Silent()) == first
        assert timed(products, "qcompile", 1, Silent(), measure=False) == first
        assert not asked
        more = _products(n=32)
        both = {**products, **more}
        assert timed(both, "qcompile", 1, Silent()).times == dict.fromkeys(both, 7.0)
        assert asked == [set(both)]
        assert timed(products, "qcompile", 1, Silent()) == first
        assert timed(products, "qcompile", 64, Silent()).times == dict.fromkeys(products, 7.0)
        monkeypatch.setattr(stopwatch, "versions", lambda: {"qcompile-onnx": "another"})
        assert timed(products, "qcompile", 1, Silent()).times == dict.fromkeys(products, 7.0)
    with limited(2):
        assert timed(products, "qcompile", 1, Silent()).machine["threads"] == 2
    assert len(asked) == 4
    assert len(list(cache.glob("*.json"))) == 5


def test_what_is_damaged_in_the_cache_is_measured_again(cache: Path, quick: None) -> None:
    products = _products()
    timed(products, "qcompile", 1, Silent())
    (file,) = cache.glob("*.json")
    for content in ("{", "[]", '{"times": 3}'):
        file.write_text(content)
        assert set(timed(products, "qcompile", 1, Silent()).times) == set(products)
        assert json.loads(file.read_text())["times"]


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path / "file"))
    assert set(timed(_products(), "qcompile", 1, Silent()).times) == set(_products())


def _stored(form: str, target: str, wanted: int | None = None, kind: str = "float32") -> onnx.ModelProto:
    model = stopwatch._model("MatMul", 64, 96, 1, kind)
    stopwatch._store(model, _grid(form, target).typed(np.dtype(kind)), target, wanted)
    return onnx.ModelProto.FromString(stopwatch._repeated(ir.to_proto(model), 3))


@pytest.mark.parametrize(
    ("form", "target", "wanted", "operator", "attributes"),
    [
        ("int4(group=32)", "qcompile", None, "MatMulInt4", {"activation_bits": 8, "block_size": 32}),
        ("int4(group=32)", "qcompile", 16, "MatMulInt4", {"activation_bits": 16}),
        ("int6(group=64)", "qcompile", None, "MatMulInt6", {"activation_bits": 16}),
        ("int4(group=32)", "matmulnbits", None, "MatMulNBits", {"accuracy_level": 4, "bits": 4}),
        ("int8(group=32)", "matmulnbits", None, "MatMulNBits", {"accuracy_level": 4, "bits": 8}),
        ("int4(group=32)", "qdq", None, "DequantizeLinear", {"block_size": 32}),
    ],
)
def test_a_product_is_stored_as_a_compile_stores_it(
    form: str, target: str, wanted: int | None, operator: str, attributes: dict[str, int]
) -> None:
    """Three times beside itself, each with codes of its own; the runtime takes it."""
    model = _stored(form, target, wanted)
    nodes = [own for own in model.graph.node if own.op_type == operator]
    assert len(nodes) == 3
    given = [{own.name: onnx.helper.get_attribute_value(own) for own in node.attribute} for node in nodes]
    assert all({name: own.get(name) for name in attributes} == attributes for own in given)
    codes = [own.raw_data for own in model.graph.initializer if own.data_type != onnx.TensorProto.FLOAT]
    large = [own for own in codes if len(own) >= 1024]
    assert len(set(large)) == len(large) == 3
    outputs = session(model.SerializeToString()).run(None, {"x": np.ones((1, 64), np.float32)})
    assert [own.shape for own in outputs] == [(1, 96)] * 3
    assert len({own.tobytes() for own in outputs}) == 3


def test_half_floats_are_timed_as_such(quick: None) -> None:
    grid = _grid("int4(group=32)").typed(np.float16)
    products = {Product(64, 96, FLOAT, type="float16"): None, Product(64, 96, str(grid), type="float16"): grid}
    assert set(timed(products, "qcompile", 1, Silent()).times) == set(products)


def test_wide_products_are_timed_by_a_part_of_their_columns(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "_MOST", 64 * 128)
    wide = stopwatch._subject(Product(64, 1024, FLOAT), None, "qcompile", 1)
    assert (wide.copies, wide.scale) == (64, 8.0)
    assert wide.session.get_outputs()[0].shape == [1, 128]
    whole = stopwatch._subject(Product(64, 96, FLOAT), None, "qcompile", 1)
    assert whole.scale == 1


def test_between_two_turns_of_a_product_all_others_have_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that none finds its weights in the caches where others find those of others."""
    seen = list[int]()

    def turn(own: Any) -> float:
        seen.append(id(own))
        return 0.0

    monkeypatch.setattr(stopwatch, "_turn", turn)
    timed(_products(), "qcompile", 1, Silent())
    count = 1 + len(_products())
    assert len(seen) >= 5 * count
    assert all(len(set(seen[at : at + count])) == count for at in range(len(seen) - count + 1))


def test_a_time_is_the_median_of_turns_less_that_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one copy, and of all columns where a part of them is run; what other work adds to a few turns is lost."""
    monkeypatch.setattr(stopwatch, "_MOST", 64 * 128)
    turns = Counter[int]()

    def turn(own: Any) -> float:
        turns[id(own)] += 1
        late, nothing = turns[id(own)] in (1, 4), own.feeds["x"].shape == (1, 8)
        return 1.0 * late + 10e-6 + (0.0 if nothing else 3e-6 * own.copies)

    monkeypatch.setattr(stopwatch, "_turn", turn)
    narrow, wide = Product(64, 96, FLOAT), Product(64, 1024, FLOAT)
    found = timed({narrow: None, wide: None}, "qcompile", 1, Silent()).times
    assert found == {narrow: pytest.approx(3.0), wide: pytest.approx(24.0)}


@pytest.mark.slow  # of true times, which other work on the machine moves
def test_larger_products_take_longer() -> None:
    """By far: 256 times the weights take more than 4 times as long, whatever else the machine does."""
    grid = _grid("int4(group=64)")
    small, large = Product(64, 64, str(grid)), Product(1024, 1024, str(grid))
    with limited(1):
        found = timed({small: grid, large: grid}, "qcompile", 1, Silent()).times
    assert found[large] > 4 * found[small]


def test_runtimes_that_are_not_here_are_refused() -> None:
    with pytest.raises(UserError, match="target qnn is for the QNN provider, which is not here to be timed"):
        timed(_products(), "qnn", 1, Silent())
    assert not timed(_products(), "qnn", 1, Silent(), measure=False).times


def test_the_command_writes_what_a_compile_reads(
    source: Path, tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "machine.json"
    assert main(["timings", str(source), "-o", str(output), "--passes", "pack", "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    assert "int4 g64 asym" in shown
    assert f"wrote     {output}" in shown
    table = Timings.from_dict(json.loads(output.read_text()))
    assert (table.target, table.rows, table.machine["threads"]) == ("qcompile", 1, 1)
    assert not any(own.format.startswith("pairs") for own in table.times)
    assert main(["timings", str(source), "--passes", "pack", "--threads", "1", "--json"]) == 0
    assert Timings.from_dict(json.loads(capsys.readouterr().out)) == table
    for words, told in (
        (["--passes", "qdq"], "a budget is for the weights of pack"),
        (["--target", "tensorrt"], "which is not here to be timed"),
        (["-o", str(source)], "is the input file"),
    ):
        assert main(["timings", str(source), *words]) == 2
        assert told in capsys.readouterr().err
