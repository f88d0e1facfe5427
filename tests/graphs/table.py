"""The table of graphs: a function builds one, its decorator says which pass lists are tried and what each must give.

A new case is one function in a module of this folder:

    @case({"pack": 15, "qdq": 30, "smooth,pack": "says why"}, packed={"MatMulInt4": 2})
    def two_heads(make: Graph) -> None:
        h = make.one("Relu", make.linear(make.input("b", 32), 32))
        make.output(make.linear(h, 8), make.linear(h, 9))

`tests/test_graphs.py` compiles it by each list, runs both files in plain ONNX Runtime and compares them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from qcompile.compiler import Calibration, Recipe, parse_passes

Feeds = dict[str, npt.NDArray[Any]]


class Graph:
    """A graph under construction; methods append and return the name of a value."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.value_info: list[onnx.ValueInfoProto] = []
        self.functions: list[onnx.FunctionProto] = []
        self.opsets = {"": 17}
        self.random, self.count = np.random.default_rng(0), 0
        self.makers: dict[str, Callable[[np.random.Generator], npt.NDArray[Any]]] = {}
        self.dtype: Any = np.float32

    def name(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def input(
        self,
        *shape: int | str,
        dtype: Any = None,
        draw: Callable[[np.random.Generator, tuple[int, ...]], npt.NDArray[Any]] | None = None,
        sizes: Mapping[str, int] | None = None,
        ranked: bool = True,
    ) -> str:
        """A graph input. Symbolic dimensions are `sizes` or 8 in the data; draw: numbers of a shape (normal).

        ranked: False for one that does not say its shape.
        """
        kind, name = np.dtype(self.dtype if dtype is None else dtype), self.name("x")
        self.inputs.append(
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(kind), shape if ranked else None)
        )
        known = tuple((sizes or {}).get(n, 8) if isinstance(n, str) else n for n in shape)
        made = draw or (lambda random, size: random.standard_normal(size))
        stored = np.dtype(str) if kind.kind == "O" else kind  # a .npz has no objects
        self.makers[name] = lambda random: np.asarray(made(random, known)).astype(stored)
        return name

    def constant(self, value: Any, stem: str = "c") -> str:
        self.constants.append(numpy_helper.from_array(np.array(value, order="C"), self.name(stem)))
        return self.constants[-1].name

    def floats(self, *shape: int, scale: float | None = None) -> str:
        """Normal numbers; by default so small that a product keeps the size of what goes in."""
        scale = 1 / np.sqrt(max(1, np.prod(shape[1:]) if len(shape) > 2 else shape[0])) if scale is None else scale
        return self.constant((self.random.standard_normal(shape) * scale).astype(self.dtype), "w")

    def op(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> list[str]:
        names = [self.name(operator) for _ in range(outputs)]
        domain = attributes.get("domain", "")
        self.opsets.setdefault(domain, 1)
        self.nodes.append(helper.make_node(operator, list(inputs), names, name=f"n_{names[0]}", **attributes))
        return names

    def one(self, operator: str, *inputs: str, **attributes: Any) -> str:
        return self.op(operator, *inputs, **attributes)[0]

    def linear(self, x: str, columns: int, rows: int = 32, *, bias: bool = False) -> str:
        y = self.one("MatMul", x, self.floats(rows, columns))
        return self.one("Add", y, self.floats(columns, scale=1.0)) if bias else y

    def output(self, *names: str, dtype: Any = None) -> None:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype if dtype is None else dtype))
        self.outputs += [helper.make_tensor_value_info(name, kind, None) for name in names]

    def feeds(self, seed: int) -> Feeds:
        random = np.random.default_rng(seed)
        return {name: make(random) for name, make in self.makers.items()}

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes, "graph", self.inputs, self.outputs, self.constants, value_info=self.value_info
        )
        opsets = [helper.make_opsetid(*pair) for pair in self.opsets.items()]
        return helper.make_model(graph, opset_imports=opsets, functions=self.functions, ir_version=9)


@dataclass(frozen=True)
class Case:
    """One graph, and by pass list the least SQNR (dB) of every float output, or words of the refusal.

    packed: operators that the compiled file must hold, with their number. options: settings of the recipe beside the
    list. coverage: the share of weights that the report must tell (None: not asked). batches: of calibration; the
    outputs are compared on one that none of them is.
    """

    name: str
    build: Callable[[Graph], None]
    lists: Mapping[str, float | str]
    packed: Mapping[str, int] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    coverage: float | None = None
    batches: int = 4

    def made(self) -> Graph:
        graph = Graph()
        self.build(graph)
        return graph

    def saved(self, graph: Graph, passes: str, folder: Path) -> tuple[Path, Path, Recipe, Calibration]:
        """What a compile takes: the graph and calibration data in a folder, where the output goes, the recipe."""
        source, output = folder / "model.onnx", folder / "out" / "model.onnx"
        onnx.save(graph.model(), source)
        data = [folder / f"{seed}.npz" for seed in range(self.batches)]
        for seed, path in enumerate(data):
            np.savez(path, **graph.feeds(seed))
        output.parent.mkdir()
        recipe = Recipe(**{"passes": parse_passes(passes), "group_size": 32, **self.options})
        return source, output, recipe, Calibration([str(path) for path in data] if graph.inputs else ())


CASES: dict[str, Case] = {}


def case(lists: Mapping[str, float | str], **expected: Any) -> Callable[[Callable[[Graph], None]], Case]:
    """Enter a function that builds a graph into the table, under its own name."""

    def enter(build: Callable[[Graph], None]) -> Case:
        if build.__name__ in CASES:
            raise ValueError(f"two cases are called {build.__name__}")
        CASES[build.__name__] = Case(build.__name__, build, lists, **expected)
        return CASES[build.__name__]

    return enter


def pairs() -> Iterator[tuple[Case, str]]:
    """Every case with every list of its own."""
    return ((case, passes) for case in CASES.values() for passes in case.lists)


def sqnr(wanted: Sequence[npt.NDArray[Any]], found: Sequence[npt.NDArray[Any]]) -> float:
    """The worst signal to quantization noise ratio in dB of the float outputs; others must be equal."""
    worst = np.inf
    for a, b in zip(wanted, found, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if a.dtype.kind != "f":
            np.testing.assert_array_equal(a, b)
            continue
        signal, noise = np.sum(a.astype("d") ** 2), np.sum((a.astype("d") - b.astype("d")) ** 2)
        assert np.isfinite(noise)
        worst = min(worst, 10 * np.log10(signal / noise) if noise else np.inf)
    return float(worst)
