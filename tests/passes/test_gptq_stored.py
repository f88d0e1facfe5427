"""What gptq says of a linear is so of the file: codes that it rounded are those that are stored, the others are not."""

import numpy as np
import pytest

from qcompile.compiler.files.load import load_model
from qcompile.models.tiny import tiny_decoder
from qcompile.passes.linears import constant

SPLIT = "outlier(threshold=0.01)"
LISTS = {  # by list behind gptq, what is said where it would not store the codes
    "qdq": "its weight is stored turned round",
    "qdq(reduce_range=true)": "weights are int7 per channel",
    "dynamic": "its weight is stored turned round",
    "dynamic(weights=tensor)": "weights are int8 per tensor",
}


def _codes(bench, model, passes: str, storing: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(stored codes by node, what gptq said of it)."""
    report = bench.compile(model, passes, calibration=[str(bench.text)], samples=24, context=64)
    graph = load_model(bench.folder / "out" / "model.onnx").graph
    stored = {
        d.node: np.asarray(constant(graph.initializers[d.detail["weight"]]).numpy()).astype(np.float32)
        for d in report.decisions[storing]
        if d.action == "quantized" and d.detail.get("kind") == "MatMul"
    }
    said = {d.node: d.reason if d.action == "skipped" else d.action for d in report.decisions.get("gptq", [])}
    return stored, said


@pytest.mark.parametrize(
    ("storing", "before"), [*((own, "") for own in LISTS), ("qdq", f"{SPLIT},"), ("dynamic", f"{SPLIT},")]
)
def test_codes_that_are_said_to_be_rounded_are_stored(bench, storing, before) -> None:
    model, name = bench.save(tiny_decoder(layers=1)), storing.partition("(")[0]
    plain, _ = _codes(bench, model, f"{before}{storing}", name)
    found, said = _codes(bench, model, f"{before}gptq,{storing}", name)
    assert found.keys() == plain.keys() == said.keys()
    for node, codes in found.items():
        assert np.array_equal(codes, plain[node]) == (said[node] != "rounded"), (node, said[node])
    assert any(reason.startswith(LISTS[storing]) for reason in said.values())
    split = [reason for reason in said.values() if reason.startswith("some of its channels stay in float")]
    assert bool(split) == bool(before)
    if LISTS[storing].startswith("its weight") and not before:
        assert "rounded" in said.values()
