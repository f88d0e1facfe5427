"""passes/state.py: what is known of weights and nodes stays with one copy of a model, and is kept in one place."""

import ast
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompile.models.tiny import tiny_mlp
from qcompile.passes.observers.extremes import MinMax
from qcompile.passes.spec import PerGroup, QuantSpec
from qcompile.passes.state import (
    Outliers,
    Twin,
    node_state,
    remember,
    set_node,
    set_weight,
    weight_state,
)

ROOT = Path(__file__).resolve().parents[2]
WEIGHT: dict[str, Any] = {"clip": False, "codes": {True: "chosen"}, "packed": {("grid", False): "stored"}}
NODE: dict[str, Any] = {
    "left": "its weight is chosen when the model runs",
    "outliers": Outliers(np.array([3]), MinMax("x")),
    "grid": QuantSpec(2, PerGroup(8)),
    "reference": (np.ones((2, 2), np.float32), "codes"),
    "twin": Twin(onnx.NodeProto(op_type="MatMul"), ()),
    "decoded": "decoded",
}


def test_nothing_is_known_at_first() -> None:
    model = tiny_mlp()
    for node in model.graph:
        assert not any(vars(node_state(node)).values())
    for value in model.graph.initializers.values():
        assert not any(vars(weight_state(value)).values())


@pytest.mark.parametrize("name", [*WEIGHT, *NODE])
def test_a_copy_of_a_model_is_changed_alone(name: str) -> None:
    """The copy begins with what the original knows; from then on neither sees what the other is told."""
    model = tiny_mlp()
    known, new = (WEIGHT | NODE)[name], {"twin": None, "clip": True}.get(name)

    def site(graph: Any) -> Any:
        return graph.node(0) if name in NODE else next(iter(graph.initializers.values()))

    read, write = (node_state, set_node) if name in NODE else (weight_state, set_weight)
    write(site(model.graph), **{name: known})
    copy = model.clone()
    assert getattr(read(site(copy.graph)), name) is known
    write(site(copy.graph), **{name: new})
    assert getattr(read(site(model.graph)), name) is known
    assert getattr(read(site(copy.graph)), name) is new
    write(site(model.graph), **{name: new})
    write(site(copy.graph), **{name: known})
    assert getattr(read(site(model.graph)), name) is new


def test_one_field_leaves_the_others() -> None:
    node = tiny_mlp().graph.node(0)
    for name, value in NODE.items():
        set_node(node, **{name: value})
    assert vars(node_state(node)) == NODE
    remember(node, weights_only=True)
    own = node_state(node)
    assert own.twin is not None
    assert own.twin.weights_only
    assert own.outliers is NODE["outliers"]
    with pytest.raises(TypeError, match="float_form"):
        set_node(node, float_form=None)


def test_no_other_module_has_the_keys() -> None:
    """So that what a field means is written once."""
    holders = {}
    for path in sorted(path for layer in ("compiler", "passes") for path in (ROOT / layer).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in ("qcompile.weight", "qcompile.node"):
                holders.setdefault(node.value, set()).add(path.name)
    assert holders == {"qcompile.weight": {"state.py"}, "qcompile.node": {"state.py"}}


def test_what_a_twin_read_is_constant_or_an_activation() -> None:
    x, bias = ir.val("x"), ir.val("b", const_value=ir.tensor(np.zeros(4, np.float32)))
    w = ir.val("w", const_value=ir.tensor(np.zeros((3, 4), np.float32)))
    twin = Twin(onnx.NodeProto(op_type="Gemm"), (x, w, None, bias))
    assert twin.activations == [x]
    assert twin.weights == 12
