"""The one check of a model's structure, on the file as it was parsed: later code never meets damage.

Invariant, for the main graph, the body of every If, Loop and Scan, and every model-local function:
1. Every tensor, in initializers and attributes, has a known type, possible dimensions and data of that size; sparse
   ones have their places within these, and fit into memory when they are dense.
2. Every value has one definition in its graph (input, initializer or node output), and every name that is read has one
   there or in a graph around it. Order and cycles: `store.load_model`, which sorts.
3. Every node has an operator and outputs; where ONNX knows the operator, as many inputs and outputs as that takes, none
   of the required ones left out, and attributes of the right types with the required ones among them. Attributes that
   count something are 1 at least.
4. Every domain that nodes are of has one version; ONNX's own is named.
5. Functions do not call themselves, and all of them put in place of their calls stay within bounds.
6. Types that the file declares exist.
How the operators' attributes and shapes fit together is left to shape inference and to ONNX Runtime.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import onnx

from qcompile.compiler.files.sparse_tensors import check_sparse
from qcompile.compiler.files.tensor_protos import check_tensor, element_type
from qcompile.passes.errors import UserError

_AGAIN = "export the model again"
# Nodes that a file may have when its functions are put in place of their calls: many times what exporters write.
_MOST_NODES, _MOST_COPIES = 100_000, 20
_Attribute = onnx.AttributeProto
# Where an attribute of each type keeps its value, and whether it must be there (an empty list is a value, too).
_HELD = {_Attribute.TENSOR: "t", _Attribute.GRAPH: "g", _Attribute.SPARSE_TENSOR: "sparse_tensor"}
_ALIAS = "ai.onnx"
# Inputs that hold one number. ONNX Runtime reads it without asking whether it is there, and a process may die of that.
_SINGLE = {"Loop": (0, 1), "If": (0,), "Range": (0, 1, 2), "TopK": (1,), "OneHot": (1,), "CumSum": (1,)}
# Attributes that count something and are 1 at least: kernels divide by some of them, and a process dies of a 0.
_COUNTS = {"group", "strides", "dilations", "kernel_shape", "blocksize", "num_groups", "num_outputs"}

Imports = dict[str, int]


@dataclass(frozen=True)
class _Scope:
    """What surrounds a graph: versions of domains, names defined outside, attributes of the function around it.

    empty: names of tensors that hold no number.
    """

    imports: Imports
    outer: Sequence[set[str]] = ()
    empty: frozenset[str] = frozenset()
    parameters: frozenset[str] | None = None


@dataclass
class _Model:
    """What the checks of one model share: its functions by domain, name and overload."""

    functions: dict[tuple[str, str, str], onnx.FunctionProto]


def check_model(proto: onnx.ModelProto) -> None:
    """Raise UserError for the first thing that breaks the invariant; it says where, but not in which file."""
    try:
        _check_texts(proto)
        _check(proto)
    except UnicodeDecodeError as error:
        raise UserError(f"a name in it is not UTF-8 ({error.reason}); {_AGAIN}") from error
    except RecursionError as error:
        raise UserError(f"its graphs are nested too deeply; {_AGAIN}") from error


@lru_cache(maxsize=256)
def _fields(descriptor: Any) -> tuple[list[str], list[str], list[str], list[str]]:
    """Names of a message type's fields: texts, lists of texts, messages, lists of messages."""
    found: tuple[list[str], list[str], list[str], list[str]] = ([], [], [], [])
    for entry in descriptor.fields:
        if entry.type == entry.TYPE_STRING or entry.message_type is not None:
            found[2 * (entry.message_type is not None) + entry.is_repeated].append(entry.name)
    return found


def _check_texts(message: Any) -> None:
    """Refuse texts that are not UTF-8, which protobuf gives as bytes; numbers and weights are not touched."""
    texts, lists, messages, repeated = _fields(message.DESCRIPTOR)
    for name in texts:
        if not isinstance(getattr(message, name), str):
            raise UserError(f"a name in it is not UTF-8: {getattr(message, name)[:80]!r}; {_AGAIN}")
    for name in lists:
        for text in getattr(message, name):
            if not isinstance(text, str):
                raise UserError(f"a name in it is not UTF-8: {text[:80]!r}; {_AGAIN}")
    for name in messages:
        if message.HasField(name):
            _check_texts(getattr(message, name))
    for name in repeated:
        for inner in getattr(message, name):
            _check_texts(inner)


def _check(proto: onnx.ModelProto) -> None:
    imports = _imports(proto.opset_import, "the model")
    model = _Model({})
    for function in proto.functions:
        key = (_domain(function.domain), function.name, function.overload)
        if key in model.functions or not function.name:
            raise UserError(f"function {function.domain}.{function.name} is defined twice or has no name; {_AGAIN}")
        model.functions[key] = function
    _check_graph(proto.graph, "the graph", _Scope(imports), model)
    if not proto.graph.output:
        raise UserError(f"the graph has no outputs, nothing to compile; {_AGAIN}")
    for key, function in model.functions.items():
        _check_function(function, ".".join(filter(None, key)), imports, model)
    _check_expansion(proto, model)


def _domain(name: str) -> str:
    return "" if name == _ALIAS else name


def _imports(given: Iterable[onnx.OperatorSetIdProto], where: str) -> Imports:
    found: Imports = {}
    for entry in given:
        domain = _domain(entry.domain)
        if found.setdefault(domain, entry.version) != entry.version:
            raise UserError(f"{where} imports two versions of operator set {domain or _ALIAS!r}; {_AGAIN}")
        if not (domain != "" or entry.version >= 1) or entry.version >= 2**31:
            raise UserError(
                f"{where} imports version {entry.version} of {domain or _ALIAS!r}, which there is not; {_AGAIN}"
            )
    return found


def _check_graph(graph: onnx.GraphProto, where: str, scope: _Scope, model: _Model) -> None:
    names = [value.name for value in graph.input]
    _distinct(names, f"{where}: input")
    tensors = [*(t.name for t in graph.initializer), *(t.values.name for t in graph.sparse_initializer)]
    _distinct(tensors, f"{where}: tensor")
    for tensor in graph.initializer:
        check_tensor(tensor, f"tensor {tensor.name!r}")
    for sparse in graph.sparse_initializer:
        check_sparse(sparse, f"tensor {sparse.values.name!r}")
    for value in (*graph.input, *graph.output, *graph.value_info):
        _check_type(value.type, f"{where}: value {value.name!r}")
    for value in graph.input:
        if value.type.WhichOneof("value") == "tensor_type":
            element_type(value.type.tensor_type.elem_type, f"{where}: input {value.name!r}")
    defined = _definitions(graph.node, {*names, *tensors}, where)
    empty = {tensor.name for tensor in graph.initializer if 0 in tensor.dims}
    inner = _Scope(scope.imports, (defined, *scope.outer), (scope.empty - defined) | empty, scope.parameters)
    for node in graph.node:
        _check_node(node, inner, model)
    for output in graph.output:
        if output.name not in defined:
            raise UserError(f"{where}: output {output.name!r} is computed by no node of it; {_AGAIN}")


def _distinct(names: Sequence[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if not name or name in seen:
            raise UserError(f"{what} {name!r} is given twice; {_AGAIN}" if name else f"{what} has no name; {_AGAIN}")
        seen.add(name)


def _definitions(nodes: Iterable[onnx.NodeProto], given: set[str], where: str) -> set[str]:
    """All names that are defined in a graph or function; UserError for one that is defined twice."""
    defined = set(given)
    for node in nodes:
        for name in filter(None, node.output):
            if name in defined:
                raise UserError(f"{where}: value {name!r} is defined twice, by {_called(node)} too; {_AGAIN}")
            defined.add(name)
    return defined


def _called(node: onnx.NodeProto) -> str:
    """A node for a message."""
    name = node.name or next(filter(None, node.output), "")
    return f"{node.op_type or 'a node'} {name!r}"


def _check_type(given: onnx.TypeProto, where: str) -> None:
    kind = given.WhichOneof("value")
    if kind in ("tensor_type", "sparse_tensor_type"):
        tensor = given.tensor_type if kind == "tensor_type" else given.sparse_tensor_type
        if tensor.elem_type:
            element_type(tensor.elem_type, where)
        if len(tensor.shape.dim) > 64:
            raise UserError(f"{where} has {len(tensor.shape.dim)} dimensions; {_AGAIN}")
    elif kind in ("sequence_type", "optional_type"):
        _check_type((given.sequence_type if kind == "sequence_type" else given.optional_type).elem_type, where)
    elif kind == "map_type":
        element_type(given.map_type.key_type, where)
        _check_type(given.map_type.value_type, where)


def _check_node(node: onnx.NodeProto, scope: _Scope, model: _Model) -> None:
    where, domain = _called(node), _domain(node.domain)
    if not node.op_type:
        raise UserError(f"{where} has no operator; {_AGAIN}")
    if not any(node.output):
        raise UserError(f"node {where} has no outputs; {_AGAIN}")
    for name in filter(None, node.input):
        if not any(name in names for names in scope.outer):
            raise UserError(f"node {where} reads {name!r}, which nothing defines; {_AGAIN}")
    _distinct([attribute.name for attribute in node.attribute], f"node {where}: attribute")
    for attribute in node.attribute:
        _check_attribute(attribute, f"node {where}: attribute {attribute.name!r}", scope, model)
        if domain in ("", "com.microsoft") and attribute.name in _COUNTS:
            _check_count(attribute, f"node {where}: attribute {attribute.name!r}")
    function = model.functions.get((domain, node.op_type, node.overload))
    if function is not None:
        _check_call(node, function, where, model)
    elif domain == "":
        if "" not in scope.imports:
            raise UserError(f"it names no opset, which says what {node.op_type} does; {_AGAIN}")
        _check_schema(node, scope.imports[""], where)
        for attribute in node.attribute:
            attribute.s.decode()  # raises where it is not UTF-8
        for place in _SINGLE.get(node.op_type, ()):
            if len(node.input) > place and node.input[place] in scope.empty:
                raise UserError(f"node {where}: input {node.input[place]!r} is empty, and must hold a number; {_AGAIN}")


def _check_attribute(attribute: onnx.AttributeProto, where: str, scope: _Scope, model: _Model) -> None:
    kind = attribute.type
    if attribute.ref_attr_name:
        if scope.parameters is None or attribute.ref_attr_name not in scope.parameters:
            raise UserError(
                f"{where} stands for {attribute.ref_attr_name!r}, which no function around it has; {_AGAIN}"
            )
        return
    if kind == _Attribute.UNDEFINED or kind not in _Attribute.AttributeType.values():
        raise UserError(f"{where} has no known type; {_AGAIN}")
    if kind in _HELD and not attribute.HasField(_HELD[kind]):
        raise UserError(f"{where} is empty; {_AGAIN}")
    if kind == _Attribute.SPARSE_TENSORS:
        raise UserError(f"{where} holds sparse tensors, which is not supported; export the model with dense weights")
    if kind == _Attribute.SPARSE_TENSOR:
        check_sparse(attribute.sparse_tensor, where)
    for tensor in [attribute.t] if kind == _Attribute.TENSOR else attribute.tensors:
        check_tensor(tensor, where)
    for graph in [attribute.g] if kind == _Attribute.GRAPH else attribute.graphs:
        _check_graph(graph, where, scope, model)
    for given in [attribute.tp] if kind == _Attribute.TYPE_PROTO else attribute.type_protos:
        _check_type(given, where)


def _check_count(attribute: onnx.AttributeProto, where: str) -> None:
    numbers = [attribute.i] if attribute.type == _Attribute.INT and not attribute.ref_attr_name else attribute.ints
    if any(number < 1 for number in numbers):
        raise UserError(f"{where} is {min(numbers)}, and must be 1 at least; {_AGAIN}")


@lru_cache(maxsize=4096)
def _schema(op_type: str, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:  # an operator that ONNX Runtime alone knows
        return None


def _check_schema(node: onnx.NodeProto, opset: int, where: str) -> None:
    schema = _schema(node.op_type, opset)
    if schema is None:
        return
    if not schema.min_input <= len(node.input) <= schema.max_input:
        raise UserError(
            f"node {where} has {len(node.input)} inputs, {node.op_type} of opset {opset} takes {schema.min_input} to "
            f"{schema.max_input}; {_AGAIN}"
        )
    if not schema.min_output <= len(node.output) <= schema.max_output:
        raise UserError(
            f"node {where} has {len(node.output)} outputs, {node.op_type} of opset {opset} gives {schema.min_output} "
            f"to {schema.max_output}; {_AGAIN}"
        )
    if lacking := _lacking(schema, node.input):
        raise UserError(f"node {where} lacks its input {lacking!r}; {_AGAIN}")
    given = {attribute.name: attribute for attribute in node.attribute}
    for name, wanted in schema.attributes.items():
        if wanted.required and name not in given:
            raise UserError(f"node {where} lacks its attribute {name!r}; {_AGAIN}")
        kind = given[name].type if name in given else int(wanted.type.value)
        if kind != int(wanted.type.value) and not (given[name].ref_attr_name and kind == _Attribute.UNDEFINED):
            names = _Attribute.AttributeType.Name(kind), wanted.type.name
            raise UserError(f"node {where}: attribute {name!r} is {names[0]}, it must be {names[1]}; {_AGAIN}")
    if unknown := set(given) - set(schema.attributes):
        raise UserError(f"node {where}: {node.op_type} of opset {opset} has no attribute {min(unknown)!r}; {_AGAIN}")


def _lacking(schema: onnx.defs.OpSchema, names: Sequence[str]) -> str:
    """The first required input that is left out by an empty name; "" where none is."""
    required = (onnx.defs.OpSchema.FormalParameterOption.Single, onnx.defs.OpSchema.FormalParameterOption.Variadic)
    for number, name in enumerate(names):
        formal = schema.inputs[min(number, len(schema.inputs) - 1)]
        if not name and formal.option in required:
            return str(formal.name)
    return ""


def _check_call(node: onnx.NodeProto, function: onnx.FunctionProto, where: str, model: _Model) -> None:
    if len(node.input) > len(function.input) or len(node.output) > len(function.output):
        raise UserError(
            f"node {where} has {len(node.input)} inputs and {len(node.output)} outputs, its function has "
            f"{len(function.input)} and {len(function.output)}; {_AGAIN}"
        )
    given = dict(zip(function.input, node.input, strict=False))
    absent = frozenset(name for name in function.input if not given.get(name))
    missing = frozenset(function.attribute) - {attribute.name for attribute in node.attribute}
    if absent or missing:
        _check_absent(function, absent, missing, where, model, set())


def _check_absent(
    function: onnx.FunctionProto,
    absent: frozenset[str],
    missing: frozenset[str],
    where: str,
    model: _Model,
    seen: set[tuple[int, frozenset[str], frozenset[str]]],
) -> None:
    """Refuse a call whose function, without these inputs and attributes, has a node that lacks a required one."""
    if (id(function), absent, missing) in seen:
        return
    seen.add((id(function), absent, missing))
    imports = _imports(function.opset_import, f"function {function.name}")
    for node in function.node:
        names = ["" if name in absent else name for name in node.input]
        left = {a.name for a in node.attribute if a.ref_attr_name not in missing or not a.ref_attr_name}
        callee = model.functions.get((_domain(node.domain), node.op_type, node.overload))
        if callee is not None:
            given = dict(zip(callee.input, names, strict=False))
            inner = frozenset(name for name in callee.input if not given.get(name))
            _check_absent(callee, inner, frozenset(callee.attribute) - left, where, model, seen)
            continue
        schema = _schema(node.op_type, imports.get("", 0)) if _domain(node.domain) == "" else None
        if schema is None:
            continue
        lost = [name for name, wanted in schema.attributes.items() if wanted.required and name not in left]
        if lacking := _lacking(schema, names) or next(iter(lost), ""):
            raise UserError(f"node {where} leaves out what its function needs, {lacking!r} of {node.op_type}; {_AGAIN}")


def _check_function(function: onnx.FunctionProto, name: str, outer: Imports, model: _Model) -> None:
    where = f"function {name}"
    imports = _imports(function.opset_import, where)
    for domain, version in imports.items():
        if outer.get(domain, version) != version:
            raise UserError(
                f"{where} is of version {version} of operator set {domain or _ALIAS!r}, the model of {outer[domain]}; "
                f"{_AGAIN}"
            )
    _distinct(list(function.input), f"{where}: input")
    _distinct(list(function.output), f"{where}: output")
    parameters = [*function.attribute, *(attribute.name for attribute in function.attribute_proto)]
    _distinct(parameters, f"{where}: attribute")
    for attribute in function.attribute_proto:
        _check_attribute(attribute, f"{where}: attribute {attribute.name!r}", _Scope(imports), model)
    defined = _definitions(function.node, set(function.input), where)
    scope = _Scope(outer | imports, (defined,), parameters=frozenset(parameters))
    for node in function.node:
        _check_node(node, scope, model)
    for value in function.value_info:
        _check_type(value.type, f"{where}: value {value.name!r}")
    for output in function.output:
        if output not in defined:
            raise UserError(f"{where}: output {output!r} is computed by no node of it; {_AGAIN}")


def _check_expansion(proto: onnx.ModelProto, model: _Model) -> None:
    """Refuse functions that call themselves, and those that blow up: 50 of two calls each are 2^50 nodes."""
    calls = {key: list(_callees(function.node, model)) for key, function in model.functions.items()}
    own = {key: _count(function.node) for key, function in model.functions.items()}
    sizes: dict[tuple[str, str, str], int] = {}
    for key in _callees_first(calls):
        sizes[key] = own[key] + sum(sizes[callee] for callee in calls[key])
    stored = _count(proto.graph.node) + sum(own.values())
    total = _count(proto.graph.node) + sum(sizes[callee] for callee in _callees(proto.graph.node, model))
    if total > max(_MOST_NODES, _MOST_COPIES * stored):
        raise UserError(f"its functions, put in place of their calls, make {total} nodes of {stored}; {_AGAIN}")


def _callees_first(calls: dict[tuple[str, str, str], list[tuple[str, str, str]]]) -> Iterable[tuple[str, str, str]]:
    """Functions behind those that they call; UserError for one that calls itself. Iterative: chains may be long."""
    done: set[tuple[str, str, str]] = set()
    for start in calls:
        path, active = [(start, iter(calls[start]))], {start}
        while path:
            key, left = path[-1]
            callee = next((other for other in left if other not in done), None) if key not in done else None
            if callee is not None:
                if callee in active:
                    raise UserError(f"function {'.'.join(filter(None, callee))} calls itself; {_AGAIN}")
                active.add(callee)
                path.append((callee, iter(calls[callee])))
                continue
            if key not in done:
                done.add(key)
                yield key
            active.discard(key)
            path.pop()


def all_nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """The nodes of all graphs and functions."""
    stack = [proto.graph.node, *(function.node for function in proto.functions)]
    while stack:
        for node in stack.pop():
            yield node
            stack += [graph.node for graph in _graphs(node)]


def all_graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph, and the bodies of all nodes."""
    yield proto.graph
    for node in all_nodes(proto):
        yield from _graphs(node)


def _graphs(node: onnx.NodeProto) -> Iterable[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _count(nodes: Iterable[onnx.NodeProto]) -> int:
    """Nodes, those of bodies too."""
    return sum(1 + sum(_count(graph.node) for graph in _graphs(node)) for node in nodes)


def _callees(nodes: Iterable[onnx.NodeProto], model: _Model) -> Iterable[tuple[str, str, str]]:
    """The functions that nodes call, once for each call."""
    for node in nodes:
        key = (_domain(node.domain), node.op_type, node.overload)
        if key in model.functions:
            yield key
        for graph in _graphs(node):
            yield from _callees(graph.node, model)
