"""Raising the opset, in place: subgraphs and functions included, weights untouched, every name kept.

onnx's own converter needs the weights in one protobuf (under 2 GB), drops model-local functions and fails on types it
does not know; onnxscript's begins at opset 18. So `opset_rules` says for each operator what changed its meaning, and
the operator's schema checks that nothing was missed. What never had a schema (SimplifiedLayerNormalization, which ONNX
Runtime's own optimizer writes into ONNX's domain) has no older meaning either and stays: the runtime says if it runs.
"""

from collections import Counter

import onnx
import onnx_ir as ir

from qcompile.passes.errors import UserError
from qcompile.passes.graph import Decide, Names
from qcompile.passes.prepare.opset_rules import RULES

MIN_OPSET, MAX_OPSET = 7, 26  # the newest is what ONNX Runtime 1.24 to 1.32 load
_MIN_IR_VERSION = 10  # that of opset 21, whose int4 tensors older ones do not know
_MAX_IR_VERSION = 13  # what ONNX Runtime loads


def raise_opset(model: ir.Model, decide: Decide, opset: int) -> None:
    """Bring every graph and function of the model to an opset, unless it has a newer one; and its IR version to 10."""
    names, target = Names(model), opset
    source, version = model.opset_imports.get("", target), model.ir_version
    named = "" in model.opset_imports
    if source < MIN_OPSET:
        raise UserError(
            f"opset {source} is older than {MIN_OPSET}; export the model again with opset {target} or newer"
        )
    model.opset_imports.setdefault("", target)  # custom operators alone name none, and get company here
    converted: Counter[str] = Counter()
    oldest = source
    unknown: Counter[str] = Counter()
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        imported = graph.opset_imports.get("", source)
        oldest = min(oldest, imported)
        if imported < target:
            for node in list(graph.all_nodes()):
                if node.domain == "" and _schema(node.op_type, target) is None:
                    unknown[node.op_type] += 1
                elif node.domain == "":
                    converted.update(_convert(node, imported, target, names))
            graph.opset_imports[""] = target
    model.ir_version = min(max(model.ir_version, _MIN_IR_VERSION), _MAX_IR_VERSION)
    if oldest < target:
        changed = ", ".join(f"{count} {op_type}" for op_type, count in sorted(converted.items())) or "no node"
        decide("", "converted", f"opset {oldest} to {target}: {changed} rewritten")
    elif not named:
        decide("", "converted", f"the file names no opset of ONNX: {target}")
    elif version != model.ir_version:
        decide("", "converted", f"IR version {version} to {model.ir_version}")
    for op_type, count in unknown.items():
        decide("", "kept", f"ONNX knows no {op_type}: left to ONNX Runtime as it is", nodes=count)


def _convert(node: ir.Node, source: int, target: int, names: Names) -> list[str]:
    """Apply every rule between the two opsets; the operator types that were rewritten."""
    rewritten = []
    for since, rule in RULES.get(node.op_type, ()):
        if source < since <= target:
            op_type = node.op_type
            if any(attribute.is_ref() for attribute in node.attributes.values()):
                raise _impossible(node, source, target, "its attributes are parameters of a model-local function")
            problem = rule(node, names)
            if isinstance(problem, str):
                raise _impossible(node, source, target, problem)
            rewritten += [op_type] if problem else []
    missed = _schema_problem(node, target) if node.graph is not None else None
    if missed is not None:
        raise _impossible(node, source, target, missed)
    return rewritten[:1]


def _schema(op_type: str, opset: int) -> onnx.defs.OpSchema | None:
    """The schema of an operator of ONNX's own domain, None where it never had one."""
    try:
        return onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return None


def _schema_problem(node: ir.Node, opset: int) -> str | None:
    schema = _schema(node.op_type, opset)
    if schema is None or schema.deprecated:
        return "the operator was removed"
    unknown = set(node.attributes) - set(schema.attributes)
    if unknown:
        return f"its attribute {min(unknown)!r} was removed"
    if not schema.min_input <= len(node.inputs) <= schema.max_input:
        return f"it takes {schema.min_input} to {schema.max_input} inputs, not {len(node.inputs)}"
    if len(node.outputs) > schema.max_output:
        return f"it gives at most {schema.max_output} outputs, not {len(node.outputs)}"
    return None


def _impossible(node: ir.Node, source: int, target: int, why: str) -> UserError:
    return UserError(
        f"node {node.name!r}: {node.op_type} of opset {source} cannot be converted to opset {target} ({why}); "
        f"export the model again with opset {target} or newer"
    )
