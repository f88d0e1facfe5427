"""passes/prepare/order.py: the small passes, each on a graph where it does something, with it and without.

A row of `EXAMPLES` is one graph and what is seen of it behind `prepare`, with all small passes and without the one that
the row is for: other operators (or whatever else the row looks at), and the same numbers. A small pass that later code
relies on is refused where the graph is not so by itself.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from preparing import Arrays, operators, parse, run
from small_passes import table

from qcompile.passes.base import Decision, Region
from qcompile.passes.errors import UserError
from qcompile.passes.origins import operators_of
from qcompile.passes.prepare import Prepare
from qcompile.passes.prepare.folding import ALREADY
from qcompile.passes.prepare.order import ORDER, SMALL, Small
from qcompile.passes.state import node_state


def floats(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype)


Seen = Callable[[ir.Model, Sequence[Decision]], object]


def kinds(model: ir.Model, _: Sequence[Decision]) -> object:
    """The operators of the main graph in one line."""
    return " ".join(operators(model))


def sizes(model: ir.Model, _: Sequence[Decision]) -> object:
    """The shapes of the constants that are no vectors."""
    shapes = (tuple(value.shape or ()) for value in model.graph.initializers.values())
    return sorted(shape for shape in shapes if len(shape) > 1)


def sources(model: ir.Model, _: Sequence[Decision]) -> object:
    """What each node is and was."""
    return " ".join("<".join(operators_of(node)) for node in model.graph)


def left(model: ir.Model, _: Sequence[Decision]) -> object:
    """Whether a product says why its weight stays computed."""
    return any(node_state(node).left for node in model.graph if node.op_type == "MatMul")


def coded(_: ir.Model, decisions: Sequence[Decision]) -> object:
    """How many weights are told to be codes already."""
    return sum(decision.reason == ALREADY for decision in decisions)


def shapeless(model: ir.Model, _: Sequence[Decision]) -> object:
    """How many values have no shape."""
    return sum(value.shape is None for node in model.graph for value in node.outputs)


@dataclass
class Example:
    """A graph, and what is seen of it with and without a small pass; `refused`: words of the decision that it needs it.

    weights: constants by name. change: what is done to the parsed model first.
    """

    body: str
    inputs: str
    outputs: str
    given: object = ""
    without: object = ""
    refused: str = ""
    weights: Arrays = field(default_factory=dict)
    opset: int = 21
    see: Seen = kinds
    change: Callable[[ir.Model], object] = lambda _: None

    def model(self) -> ir.Model:
        made = parse(self.body, self.inputs, self.outputs, opset=self.opset, **self.weights)
        self.change(made)
        return made


W = {"w": floats(32, 48)}
IN, OUT = "float[5,32] x", "float[5,48] y"
TABLE = floats(512, 64)  # 128 KiB: no second copy of it is made


def _traced(model: ir.Model) -> None:
    for node in model.graph:
        node.metadata_props["pkg.torch.onnx.stack_trace"] = "File model.py"


def _traces(model: ir.Model, _: Sequence[Decision]) -> object:
    return sum(len(node.metadata_props) for node in model.graph)


def _with_function(model: ir.Model) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        g (float[5,32] x) => (float[5,32] y) { y = Relu(x) }
        <domain: "local", opset_import: ["" : 21]> Twice (a) => (c) { b = Relu(a) c = Neg(b) }"""
    function = ir.from_proto(onnx.parser.parse_model(text)).functions
    model.functions.update(function)
    model.opset_imports["local"] = 1
    model.graph[0].domain, model.graph[0].op_type = "local", "Twice"


def _with_default(model: ir.Model) -> None:
    model.graph.inputs.append(model.graph.initializers["w"])


def _inputs(model: ir.Model, _: Sequence[Decision]) -> object:
    return len(model.graph.inputs)


def _on_disk(model: ir.Model) -> None:
    _put_on_disk(model, "b")


def _put_on_disk(model: ir.Model, name: str) -> None:
    value = model.graph.initializers[name]
    array = np.asarray(value.const_value)
    Path(f"{name}.data").write_bytes(array.tobytes())
    value.const_value = ir.ExternalTensor(
        f"{name}.data",
        0,
        array.nbytes,
        ir.DataType.from_numpy(array.dtype),
        shape=ir.Shape(array.shape),
        name=name,
        base_dir=".",
    )


def _externals(model: ir.Model, _: Sequence[Decision]) -> object:
    return sum(isinstance(value.const_value, ir.ExternalTensor) for value in model.graph.initializers.values())


def _stale(model: ir.Model) -> None:
    model.graph[0].outputs[0].shape = ir.Shape([1, 48])


def _fused(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "FusedMatMul":
            node.domain = "com.microsoft"
    model.opset_imports["com.microsoft"] = 1


def _untold(model: ir.Model) -> None:
    model.graph.outputs[0].shape = None


def _in_bodies(model: ir.Model, _: Sequence[Decision]) -> object:
    return " ".join(node.op_type for node in model.graph.all_nodes())


BRANCHES = """y = If (flag) <then_branch = a () => (float[5,32] p) { h = Relu(x) p = Neg(h) },
    else_branch = b () => (float[5,32] q) { h = Abs(x) q = Neg(h) }>"""
SCAN = """s, y = Scan <num_scan_inputs = 1, body = step
    (float[5,32] c, float[32,32] m) => (float[5,32] n, float[5,32] o) { n = MatMul(c, m) o = Relu(n) }> (x, w)"""
KEYS = """last = Constant <value = int64[1] {-1}> () first = Concat <axis = 0> (last, m, n)
    s = Shape(x) lead = Slice(s, low, two) m = Slice(s, two, last) far = Constant <value = int64[1] {99}> ()
    n = Slice(s, last, far) second = Concat <axis = 0> (lead, n, m)
    a = Reshape(x, first) b = Transpose <perm = [0, 2, 1]> (a) y = Reshape(b, second)"""
GUARD = """m = Where(keep, zero, low) t = Add(x, m) s = Softmax <axis = -1> (t) n = IsNaN(s) r = Where(n, zero, s)
    y = Neg(r)"""
ROTARY = """c = Cos(t) s = Sin(t) ah, al = Split <axis = -1, num_outputs = 2> (a) an = Neg(al)
    aj = Concat <axis = -1> (an, ah) am = Mul(aj, s) ak = Mul(a, c) ra = Add(ak, am)
    bh, bl = Split <axis = -1, num_outputs = 2> (b) bn = Neg(bl)
    bj = Concat <axis = -1> (bn, bh) bm = Mul(bj, s) bk = Mul(b, c) rb = Add(bk, bm) y = Add(ra, rb)"""
HEADS = """ku = Unsqueeze(k, at) ke = Expand(ku, five) kr = Reshape(ke, four) kt = Transpose <perm = [0, 1, 3, 2]> (kr)
    vu = Unsqueeze(v, at) ve = Expand(vu, five) vr = Reshape(ve, four) s = MatMul(q, kt) p = Softmax <axis = 3> (s)
    o = MatMul(p, vr) y = Neg(o)"""
HEADED = {"at": np.int64([2]), "five": np.int64([2, 3, 2, 5, 8]), "four": np.int64([2, 6, 5, 8])}
SWISH = "a = Add(x, three) b = Clip(a, zero, six) c = Mul(x, b) y = Div(c, six)"
LIMITS = {"zero": np.float32(0), "three": np.float32(3), "six": np.float32(6)}

EXAMPLES = {
    "sort": Example("y = Neg(h) h = Relu(x)", IN, "float[5,32] y", "Relu Neg", refused="nodes stood before what"),
    "remove_traces": Example("y = Relu(x)", IN, "float[5,32] y", 0, 1, see=_traces, change=_traced),
    "name_nodes": Example("y = Relu(x)", IN, "float[5,32] y", "Relu", refused="1 nodes had no name of their own"),
    "inline_functions": Example("y = Relu(x)", IN, "float[5,32] y", "Relu Neg", "Twice", change=_with_function),
    "note_origins": Example(
        "y = Gemm(x, w)", IN, OUT, "MatMul<Gemm", "MatMul", weights=W, see=sources
    ),
    "unique_names": Example(
        BRANCHES, IN + ", bool flag", "float[5,32] y", "If", refused="1 values of bodies were called like others"
    ),
    "fix_defaults": Example("y = MatMul(x, w)", IN, OUT, 1, 2, weights=W, see=_inputs, change=_with_default),
    "load_small": Example(
        "y = Add(x, b)", IN, "float[5,32] y", 0, 1, weights={"b": floats(32)}, see=_externals, change=_on_disk
    ),
    "infer_anew": Example(
        "h = MatMul(x, w) y = Relu(h)", IN, OUT, "MatMul Relu", refused="are stale: h has shape", weights=W,
        change=_stale,
    ),
    "raise_opset": Example(
        "y = Upsample <mode = \"nearest\"> (x, s)", "float[1,2,3,4] x", "float[1,2,6,8] y", "Resize",
        refused="opset 9 to 21: 1 Upsample rewritten", weights={"s": np.float32([1, 1, 2, 2])}, opset=9,
    ),
    "lift_constants": Example(
        "c = Constant <value = float {2}> () y = Mul(x, c)", IN, "float[5,32] y", "Mul", "Constant Mul"
    ),
    "remove_identities": Example("h = Identity(x) y = Relu(h)", IN, "float[5,32] y", "Relu", "Identity Relu"),
    "name_casts": Example("y = CastLike(x, k)", "float[5,32] x, int64 k", "int64[5,32] y", "Cast", "CastLike"),
    "number_steps": Example(
        SCAN, IN, "float[5,32] s, float[3,5,32] y", "Scan Gather MatMul Relu", "Scan MatMul Relu",
        weights={"w": floats(3, 32, 32)}, see=_in_bodies,
    ),
    "remove_unused": Example("y = Relu(x) h = Neg(x)", IN, "float[5,32] y", "Relu", "Relu Neg"),
    "take_apart": Example("y = FusedMatMul(x, w)", IN, OUT, "MatMul", "FusedMatMul", weights=W, change=_fused),
    "infer_new": Example(
        "h = FusedMatMul(x, w) y = MatMul(v, h)", "float[64,32] x", "float[40,48] y",
        "MatMul Transpose MatMul Transpose", "MatMul MatMul", weights={**W, "v": floats(40, 64)}, change=_fused,
    ),
    "merge_duplicates": Example(
        "a = MatMul(x, w) b = MatMul(h, v) y = Add(a, b)", IN + ", float[5,32] h", OUT, [(32, 48)], [(32, 48)] * 2,
        weights={**W, "v": W["w"]}, see=sizes,
    ),
    "report_quantized": Example(
        "d = DequantizeLinear(c, s) y = MatMul(x, d)", IN, OUT, 1, 0,
        weights={"c": (floats(32, 48) * 40).astype(np.int8), "s": np.float32(0.01)}, see=coded,
    ),
    "turn_tables": Example(
        "t = Transpose(w) g = Gather(t, ids) y = MatMul(g, w)", "int64[3] ids", "float[3,512] y", [(512, 64)],
        [(64, 512)], weights={"w": np.ascontiguousarray(TABLE.T)}, see=sizes,
    ),
    "number_sizes": Example(
        "s = Shape(x) e = Slice(s, one, two) p = Slice(w, zero, e) y = MatMul(x, p)", IN, OUT, "MatMul",
        "Shape Slice Slice MatMul",
        weights={"w": floats(64, 48), "zero": np.int64([0]), "one": np.int64([1]), "two": np.int64([2])},
    ),
    "fold_constants": Example(
        "t = Transpose(w) y = MatMul(x, t)", IN, OUT, "MatMul", "Transpose MatMul", weights={"w": floats(48, 32)}
    ),
    "split_gemms": Example("y = Gemm(x, w)", IN, OUT, "MatMul", "Gemm", weights=W),
    "pair_einsums": Example(
        'y = Einsum <equation = "bk,bk,kn->bn"> (x, x, w)', IN, OUT, "Einsum MatMul", "Einsum", weights=W
    ),
    "turn_einsums": Example('y = Einsum <equation = "bk,kn->bn"> (x, w)', IN, OUT, "MatMul", "Einsum", weights=W),
    "split_experts": Example(
        "y = MatMul(x, w)", IN, "float[2,5,48] y", "MatMul Unsqueeze MatMul Unsqueeze Concat", "MatMul",
        weights={"w": floats(2, 32, 48)},
    ),
    "turn_products": Example(
        "y = MatMul(x, w)", IN, "float[1,5,48] y", "MatMul Unsqueeze", "MatMul", weights={"w": floats(1, 32, 48)}
    ),
    "tie_heads": Example(
        "g = Gather(w, ids) y = MatMul(g, h)", "int64[3] ids", "float[3,512] y", "Gather Transpose MatMul",
        "Gather MatMul", weights={"w": TABLE, "h": np.ascontiguousarray(TABLE.T)},
    ),
    "divide": Example(
        "d = Exp(x) r = Reciprocal(d) y = Mul(x, r)", IN, "float[5,32] y", "Exp Div", "Exp Reciprocal Mul"
    ),
    "transpose_keys": Example(
        KEYS, "float[a,3,c,8] x", "float[a,3,8,c] y", "Transpose",
        "Shape Slice Concat Slice Concat Reshape Transpose Reshape",
        weights={"low": np.int64([-9]), "two": np.int64([-2])},
    ),
    "merge_sizes": Example(
        "f = Shape(x) a = Gather(f, i) b = Shape <start = 0, end = 1> (x) y = Add(a, b)",
        "float[n,32] x", "int64[1] y", "Shape Gather Add", "Shape Gather Shape Add", weights={"i": np.int64([0])},
    ),
    "remove_neutral": Example(
        "h = Mul(x, one) y = Relu(h)", IN, "float[5,32] y", "Relu", "Mul Relu", weights={"one": np.float32(1)}
    ),
    "remove_guards": Example(
        GUARD, "float[5,32] x, bool[5,32] keep", "float[5,32] y", "Where Add Softmax Neg",
        "Where Add Softmax IsNaN Where Neg", weights={"zero": np.float32(0), "low": np.float32(-1e9)},
    ),
    "sign_tables": Example(
        ROTARY, "float[2,3,4,8] a, float[2,3,4,8] b, float[2,1,4,8] t", "float[2,3,4,8] y",
        "Cos Sin Split Concat Mul Mul Mul Add Split Concat Mul Mul Add Add",
        "Cos Sin Split Neg Concat Mul Mul Add Split Neg Concat Mul Mul Add Add",
    ),
    "group_heads": Example(
        HEADS, "float[2,6,4,8] q, float[2,3,5,8] k, float[2,3,5,8] v", "float[2,6,4,8] y",
        "Unsqueeze Transpose Unsqueeze Reshape MatMul Softmax MatMul Reshape Neg",
        "Unsqueeze Expand Reshape Transpose Unsqueeze Expand Reshape MatMul Softmax MatMul Neg",
        weights=HEADED,
    ),
    "name_hard_swishes": Example(SWISH, IN, "float[5,32] y", "HardSwish", "Add Clip Mul Div", weights=LIMITS),
    "fold_convolutions": Example(
        "c = Conv(x, w) y = Mul(c, k)", "float[1,2,5,5] x", "float[1,3,3,3] y", "Conv", "Conv Mul",
        weights={"w": floats(3, 2, 3, 3), "k": floats(3, 1, 1)},
    ),
    "merge_equal": Example("a = Exp(x) b = Exp(x) y = Add(a, b)", IN, "float[5,32] y", "Exp Add", "Exp Exp Add"),
    "narrow_doubles": Example(
        "y = MatMul(x, w)", "double[5,32] x", "double[5,48] y", "Cast MatMul Cast", "MatMul",
        weights={"w": floats(32, 48, dtype=np.float64)},
    ),
    "note_computed": Example(
        "c = Cast <to = 1> (w) h = MatMul(x, c) v = Gather(w, ids) z = Cast <to = 1> (v) y = Add(h, z)",
        "float[512,512] x, int64[1] ids", "float[512,64] y", True, False,
        weights={"w": TABLE.astype(np.float16)}, see=left,
    ),
    "keep_origins": Example("y = Gemm(x, w)", IN, OUT, "MatMul<Gemm", "MatMul", weights=W, see=sources),
    "infer_shapes": Example(
        "y = Gemm(x, w, b)", IN, OUT, 1, 2, weights={**W, "b": floats(48)}, see=shapeless, change=_untold
    ),
}  # fmt: skip


def shapes(model: ir.Model, _: Sequence[Decision]) -> object:
    """The shapes of all values that nodes compute, in bodies too."""
    return [str(value.shape) for node in model.graph.all_nodes() for value in node.outputs]


def names(model: ir.Model, _: Sequence[Decision]) -> object:
    """How many names stand for two values of the main graph."""
    found = [*model.graph.initializers, *(value.name for node in model.graph for value in node.outputs)]
    return len(found) - len(set(found))


def keeps(_: ir.Model, decisions: Sequence[Decision]) -> object:
    """How many nodes are told to stay."""
    return sum(decision.action == "kept" for decision in decisions)


def skips(_: ir.Model, decisions: Sequence[Decision]) -> object:
    """How many nodes are told to be left."""
    return sum(decision.action == "skipped" for decision in decisions)


def _shape_on_disk(model: ir.Model) -> None:
    _put_on_disk(model, "s")


CUT = "e = Slice(h, one, two) p = Slice(w, zero, e) "
CUTS = {"w": floats(64, 48), "zero": np.int64([0]), "one": np.int64([1]), "two": np.int64([2])}
RESHAPED = "r = Reshape(x, s) h = Shape(r) " + CUT + "y = MatMul(r, p)"
DOUBLES: dict[str, Any] = {"weights": {"w": floats(32, 48, dtype=np.float64)}}
DOUBLE = ("double[5,32] x", "double[5,48] y")
NUMBERS = "{1,2,3,4,5,6,7,8,9,8,7,6}"

# By small pass and one that it stands behind: a graph, and what is seen of it behind all small passes in their order.
# Something else is seen where the first runs before the second.
WITNESSES = {
    ("note_origins", "name_nodes"): EXAMPLES["note_origins"],
    ("infer_anew", "unique_names"): Example(
        """y = If (flag) <then_branch = a () => (float[10,32] p) { h = Concat <axis = 0> (x, x) p = Neg(h) },
        else_branch = b () => (float[5,32] q) { h = Abs(x) q = Neg(h) }>""", IN + ", bool flag", "float[n,32] y",
        ["[n,32]", "[10,32]", "[10,32]", "[5,32]", "[5,32]"], see=shapes,
    ),
    ("infer_anew", "load_small"): Example(
        RESHAPED, "float[160] x", OUT, "Reshape MatMul", weights={**CUTS, "s": np.int64([5, 32])}, change=_shape_on_disk
    ),
    ("raise_opset", "infer_anew"): Example(
        "h = Relu(x) s = Softmax <axis = 1> (h) y = Neg(s)", "float[2,3,4] x", "float[2,3,4] y",
        "Relu Shape Flatten Softmax Reshape Neg", opset=11,
    ),
    ("lift_constants", "unique_names"): Example(
        """h = Relu(x) z = If (flag) <then_branch = a () => (float[2,2] p)
        { h = Constant <value = float[2,2] {1,2,3,4}> () p = MatMul(x, h) },
        else_branch = b () => (float[2,2] q) { q = Neg(x) }> y = Add(h, z)""", "float[2,2] x, bool flag",
        "float[2,2] y", 0, see=names,
    ),
    ("remove_identities", "infer_anew"): Example(
        "h = Relu(x) c = Cast <to = 1> (h) y = Relu(c)", IN, "float[5,32] y", "Relu Relu"
    ),
    ("name_casts", "infer_anew"): Example("h = Shape(x) y = CastLike(x, h)", IN, "int64[5,32] y", "Cast"),
    ("number_steps", "lift_constants"): Example(
        f"w = Constant <value = float[3,2,2] {NUMBERS}> () " + SCAN.replace("32", "2"), "float[5,2] x",
        "float[5,2] s, float[3,5,2] y", "Scan Gather MatMul Relu", see=_in_bodies,
    ),
    ("take_apart", "remove_unused"): Example(
        "y = FusedMatMul <alpha = 0.5> (x, w) d = MatMul(x, w)", IN, OUT, "MatMul", weights=W, change=_fused
    ),
    ("turn_tables", "merge_duplicates"): Example(
        "a = Gather(w, ids) t = Transpose(v) b = Gather(t, ids) c = Gather(t, more) y = Concat <axis = 1> (a, b, c)",
        "int64[3] ids, int64[3] more", "float[3,640] y", [(512, 64)],
        weights={"w": np.ascontiguousarray(TABLE.T), "v": np.ascontiguousarray(TABLE.T)}, see=sizes,
    ),
    ("number_sizes", "infer_anew"): Example(
        "r = Relu(x) h = Shape(r) " + CUT + "y = MatMul(r, p)", IN, OUT, "Relu MatMul", weights=CUTS
    ),
    ("fold_constants", "number_sizes"): Example(
        "h = Shape(x) " + CUT + "y = Gemm(x, p)", IN, OUT, "MatMul", weights=CUTS
    ),
    ("fold_constants", "remove_unused"): Example(
        "c = Cast <to = 1> (w) y = MatMul(x, c) d = Gather(w, ids)", "float[5,512] x, int64[3] ids", "float[5,64] y", 0,
        weights={"w": TABLE.astype(np.float16)}, see=keeps,
    ),
    ("fold_constants", "turn_tables"): Example(
        "t = Transpose(w) g = Gather(t, ids) h = Gather <axis = 1> (w, ids) y = MatMul(g, h)", "int64[3] ids",
        "float[3,3] y", 0, weights={"w": np.ascontiguousarray(TABLE.T)}, see=keeps,
    ),
    ("split_gemms", "fold_constants"): Example(
        "c = Cast <to = 1> (w) y = Gemm(x, c)", IN, OUT, "MatMul", weights={"w": floats(32, 48, dtype=np.float16)}
    ),
    ("pair_einsums", "fold_constants"): Example(
        'c = Transpose(w) y = Einsum <equation = "bk,bk,kn->bn"> (x, x, c)', IN, OUT, "Einsum MatMul",
        weights={"w": floats(48, 32)},
    ),
    ("turn_einsums", "pair_einsums"): EXAMPLES["pair_einsums"],
    ("split_experts", "fold_constants"): Example(
        "c = Transpose <perm = [0, 2, 1]> (w) y = MatMul(x, c)", IN, "float[2,5,48] y",
        "MatMul Unsqueeze MatMul Unsqueeze Concat", weights={"w": floats(2, 48, 32)},
    ),
    ("turn_products", "fold_constants"): Example(
        "c = Transpose(w) y = MatMul(c, x)", "float[64,32] x", "float[40,32] y", "Transpose MatMul Transpose",
        weights={"w": floats(64, 40)},
    ),
    ("turn_products", "split_experts"): Example(
        "y = MatMul(w, x)", "float[32,5] x", "float[2,40,5] y", 0, weights={"w": floats(2, 40, 32)}, see=skips
    ),
    ("tie_heads", "fold_constants"): Example(
        "g = Gather(w, ids) r = Reshape(h, s) y = MatMul(g, r)", "int64[3] ids", "float[3,512] y",
        "Gather Transpose MatMul", weights={"w": TABLE, "h": TABLE.T.reshape(-1), "s": np.int64([64, 512])},
    ),
    ("tie_heads", "split_gemms"): Example(
        "g = Gather(w, ids) y = Gemm(g, h)", "int64[3] ids", "float[3,512] y", "Gather Transpose MatMul",
        weights={"w": TABLE, "h": np.ascontiguousarray(TABLE.T)},
    ),
    ("group_heads", "remove_unused"): Example(
        HEADS + " d = Relu(p)", "float[2,6,4,8] q, float[2,3,5,8] k, float[2,3,5,8] v", "float[2,6,4,8] y",
        EXAMPLES["group_heads"].given, weights=HEADED,
    ),
    ("fold_convolutions", "name_hard_swishes"): Example(
        "c = Conv(x, w) a = Add(c, three) b = Clip(a, zero, six) y = Div(b, six)", "float[1,2,5,5] x",
        "float[1,3,3,3] y", "Conv HardSigmoid", weights={**LIMITS, "w": floats(3, 2, 3, 3)},
    ),
    ("narrow_doubles", "split_gemms"): Example("y = Gemm(x, w)", *DOUBLE, "Cast MatMul Cast", **DOUBLES),
    ("narrow_doubles", "turn_products"): Example(
        "y = MatMul(x, w)", "double[5,32] x", "double[1,5,48] y", "Cast MatMul Cast Unsqueeze",
        weights={"w": floats(1, 32, 48, dtype=np.float64)},
    ),
    ("narrow_doubles", "turn_einsums"): Example(
        'y = Einsum <equation = "bk,kn->bn"> (x, w)', *DOUBLE, "Cast MatMul Cast", **DOUBLES
    ),
    ("note_computed", "fold_constants"): Example(
        "t = Transpose(w) y = MatMul(x, t)", IN, OUT, False, weights={"w": floats(48, 32)}, see=left
    ),
    ("keep_origins", "note_origins"): EXAMPLES["keep_origins"],
    ("keep_origins", "name_nodes"): EXAMPLES["keep_origins"],
}  # fmt: skip


def _feeds(model: ir.Model) -> Arrays:
    """Numbers for every input; symbols are 6."""
    rng, made = np.random.default_rng(5), dict[str, Any]()
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        shape = [size if isinstance(size, int) else 6 for size in value.shape or ()]
        dtype = ir.DataType(value.dtype or 0).numpy()
        kind = dtype.kind
        numbers = rng.standard_normal(shape) if kind == "f" else rng.integers(0, 2 if kind == "b" else 4, shape)
        made[str(value.name)] = np.asarray(numbers).astype(dtype)
    return made


@pytest.mark.parametrize("name", EXAMPLES)
def test_small_pass(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = EXAMPLES[name]
    source = example.model()
    feeds = _feeds(source)
    wanted = run(source, feeds)
    for without, seen in (("none", example.given), (name, example.without)):
        model, step = example.model(), Prepare(without=without)
        if example.refused and without == name:
            with pytest.raises(
                UserError, match=rf"prepare\(without={name}\): this model needs it \(.*{example.refused}"
            ):
                step.call(Region.whole(model))
            return
        step.call(Region.whole(model))
        assert example.see(model, step.decisions) == seen
        off = [decision for decision in step.decisions if decision.reason == f"switched off by prepare(without={name})"]
        assert len(off) == (without == name)
        for old, new in zip(wanted, run(model, feeds), strict=True):
            np.testing.assert_allclose(new, old, rtol=0, atol=1e-5 * max(np.abs(old).max(), 1))
    assert example.given != example.without


def test_every_small_pass_has_its_example() -> None:
    assert list(EXAMPLES) == list(SMALL)
    assert all((example.refused != "") == (SMALL[name].ground != "") for name, example in EXAMPLES.items())


def test_the_table_of_them_is_true() -> None:
    """docs/prepare.md has the table that `small_passes.py` prints."""
    text = (Path(__file__).parents[3] / "docs" / "prepare.md").read_text(encoding="utf-8")
    assert f"\n\n{table()}\n" in text


def test_small_passes_stand_behind_what_they_need_and_each_reason_has_its_witness() -> None:
    places = [turn.name for turn in ORDER]
    pairs = [(small.name, earlier) for small in SMALL.values() for earlier in small.after]
    assert sorted(pairs) == sorted(WITNESSES)
    assert all(places.index(earlier) < places.index(name) for name, earlier in pairs)


@pytest.mark.parametrize(("name", "earlier"), WITNESSES)
def test_the_order_matters(name: str, earlier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another order, in which the first runs before the second, does less, or fails."""
    monkeypatch.chdir(tmp_path)
    witness, step = WITNESSES[name, earlier], Prepare()
    model = witness.model()
    step.call(Region.whole(model))
    assert witness.see(model, step.decisions) == witness.given
    order = [turn for turn in ORDER if turn is not SMALL[name]]
    order.insert([turn.name for turn in order].index(earlier), SMALL[name])
    monkeypatch.setattr("qcompile.passes.prepare.prepare.ORDER", order)
    model, step = witness.model(), Prepare()
    with contextlib.suppress(UserError):
        step.call(Region.whole(model))
        assert witness.see(model, step.decisions) != witness.given


def test_what_runs_again_has_run_before_and_says_why() -> None:
    names = [turn.name for turn in ORDER]
    for place, turn in enumerate(ORDER):
        assert set(turn.only_after) <= set(names[:place])
        assert isinstance(turn, Small) == (turn.name not in names[:place])
        assert isinstance(turn, Small) or turn.why


def test_every_decision_names_its_small_pass() -> None:
    for example in EXAMPLES.values():
        if example.change not in (_on_disk,):
            step = Prepare(without="merge_equal")
            step.call(Region.whole(example.model()))
            assert all(decision.detail["by"] in SMALL for decision in step.decisions)


@pytest.mark.parametrize(
    ("without", "message"),
    [
        ("split_gem", r"no small pass 'split_gem' to do without; did you mean 'split_gemms'"),
        ("divide+fold", r"no small pass 'fold' to do without; did you mean .*fold_co"),
        ("none+divide", r"no small pass 'none'"),
        ("divide+", r"no small pass ''"),
        ("zzz", r"no small pass 'zzz' to do without; `qcompile passes prepare` lists them"),
    ],
)
def test_unknown_small_passes_are_told(without: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Prepare(without=without)


def test_several_are_switched_off_together() -> None:
    model = EXAMPLES["name_hard_swishes"].model()
    Prepare(without="name_hard_swishes + merge_equal+divide").call(Region.whole(model))
    assert operators(model) == ["Add", "Clip", "Mul", "Div"]
