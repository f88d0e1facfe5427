"""Mutants that were looked at and change nothing that a caller could see: file, line, what becomes of it, and why."""

from typing import NamedTuple


class Equivalent(NamedTuple):
    """line, fault: without what they are indented by."""

    path: str
    line: str
    fault: str
    why: str


_NEVER = "the two differ only where the other operand decides already"
_REQUIRED = "ONNX requires it, so that what stands in its stead is never read"
_LIMIT = "a limit of effort or a threshold of real numbers: nobody is promised on which side its last element falls"

EQUIVALENT = (
    Equivalent("passes/absorb.py", "if most <= 0:", "if most <= 1:", _LIMIT),
    Equivalent(
        "passes/contrib/appended.py",
        """return f"{'a ' + others[0] if others else 'the graph'} reads it, too\"""",
        """return f"{'a ' + others[ -1] if others else 'the graph'} reads it, too\"""",
        "of several that read it any will do",
    ),
    Equivalent(
        "passes/formats/decoded.py",
        "if place is None or not isinstance(graph, ir.Graph):",
        "if place is None and not isinstance(graph, ir.Graph):",
        _NEVER,
    ),
    Equivalent(
        "passes/gates.py",
        "if a is not None and b is not None:",
        "if a is not None or b is not None:",
        "a Mul has both its operands",
    ),
    Equivalent(
        "passes/observers/counting.py",
        "TENSOR, CHANNEL = Bins(64, 32), Bins(16, 24)",
        "TENSOR, CHANNEL = Bins( 65, 32), Bins(16, 24)",
        _LIMIT,
    ),
    Equivalent(
        "passes/observers/grids.py",
        "numbers = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)",
        "numbers = np.arange( 257, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)",
        "the numbers of 256 bytes, the first one twice, of which `unique` leaves one",
    ),
    Equivalent(
        "passes/prepare/constant_ops.py",
        "if repeats is None or len(repeats) != len(source.shape) or min(repeats, default=1) < 0:",
        "if repeats is None or len(repeats) != len(source.shape) or min(repeats, default= 0) < 0:",
        _NEVER,
    ),
    Equivalent(
        "passes/prepare/constant_ops.py",
        "return Made((tuple(letters[letter] for letter in result),), dtype, function, "
        "work=prod(letters.values()) // 8)",
        "return Made((tuple(letters[letter] for letter in result),), dtype, function, work=prod(letters.values()) * 8)",
        _LIMIT,
    ),
    Equivalent(
        "passes/prepare/doubles.py",
        'if node.op_type == "Cast" and node.graph is place.graph and node.attributes.get_int("to", 0) == 1:',
        'if node.op_type == "Cast" and node.graph is place.graph and node.attributes.get_int("to", 1) == 1:',
        _REQUIRED,
    ),
    Equivalent(
        "passes/prepare/folding.py",
        "if extra <= limit and (extra <= 0 or grown + extra <= budget):",
        "if extra <= limit and (extra <= 1 or grown + extra <= budget):",
        _LIMIT,
    ),
    Equivalent(
        "passes/prepare/infer.py",
        '"weights", 0, None, tensor.dtype, shape=shape, name=value.name or ""',
        '"weights", 1, None, tensor.dtype, shape=shape, name=value.name or ""',
        "a place in a file that nobody reads",
    ),
    Equivalent(
        "passes/prepare/products.py",
        "return producer.inputs[0]",
        "return producer.inputs[ -1]",
        "a Transpose has one input",
    ),
    Equivalent(
        "passes/prepare/scans.py",
        'body, count = node.attributes["body"].as_graph(), node.attributes.get_int("num_scan_inputs", 0) or 0',
        'body, count = node.attributes["body"].as_graph(), node.attributes.get_int("num_scan_inputs", 1) or 0',
        _REQUIRED,
    ),
    Equivalent(
        "passes/prepare/sizes.py",
        "return (int(number),) * length[0] if 0 <= length[0] <= _LOOKS else None",
        "return (int(number),) * length[0] if 0 <= length[0] < _LOOKS else None",
        _LIMIT,
    ),
    Equivalent(
        "passes/qdq/biases.py",
        "if bias is None or value is None or constant(value).dtype != ir.DataType.FLOAT:",
        "if bias is None and value is None or constant(value).dtype != ir.DataType.FLOAT:",
        _NEVER,
    ),
    Equivalent(
        "passes/qdq/ranges.py",
        "return endless if array is None or not array.size else float(array.reshape(-1)[0])",
        "return endless if array is None or not array.size else float(array.reshape(1)[0])",
        "an array of one number",
    ),
    Equivalent(
        "passes/routers.py",
        "if indices is not None and slot == 0 and len(node.outputs) > indices and node.outputs[indices].uses():",
        "if indices is not None and slot == 0 and len(node.outputs) >= indices and node.outputs[indices].uses():",
        "TopK has two outputs and ArgMax one, by their definition",
    ),
    Equivalent(
        "passes/smooth.py",
        "_INT8_ALPHAS = (0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85)",
        "_INT8_ALPHAS = ( -0.6, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85)",
        "one of eight candidates, of which the best is taken: how many are tried is a limit of effort",
    ),
    Equivalent(
        "passes/smooth.py",
        'if pair.kind == "inserted" and isinstance(choice, Choice) and choice.relative_loss > _WORTH_A_MUL:  # Case 3',
        'if pair.kind == "inserted" and isinstance(choice, Choice) and choice.relative_loss >= _WORTH_A_MUL:  # Case 3',
        _LIMIT,
    ),
)
