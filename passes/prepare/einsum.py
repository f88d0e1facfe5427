"""Einsum of an activation and a constant weight, where it is a matrix product, as MatMul."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from string import ascii_letters

import onnx_ir as ir

from qcompile.passes.graph import Decide, Names, decided, is_constant
from qcompile.passes.linears import dimensions
from qcompile.passes.prepare.constant_types import FLOATS
from qcompile.passes.prepare.writer import Writer
from qcompile.passes.state import set_node


@dataclass(frozen=True)
class _Product:
    """result[free, batch, columns] = sum over `summed` of x[free, batch, summed] W[batch, summed, columns].

    x, weight, result: the indices of the operands and of the result, as they stand. sizes: of the weight's indices.
    """

    x: str
    weight: str
    result: str
    sizes: dict[str, int]

    @property
    def summed(self) -> str:
        return "".join(index for index in self.x if index in self.weight and index not in self.result)

    @property
    def batch(self) -> str:
        return "".join(index for index in self.result if index in self.x and index in self.weight)

    @property
    def free(self) -> str:
        return "".join(index for index in self.result if index not in self.weight)

    @property
    def columns(self) -> str:
        return "".join(index for index in self.result if index not in self.x)

    @property
    def rows(self) -> str:
        """The indices before the summed ones, the rows of each matrix last."""
        return self.free[:-1] + self.batch + self.free[-1:]

    def problem(self) -> str:
        """Why it is no matrix product; an empty string for one."""
        if any(len(set(term)) < len(term) for term in (self.x, self.weight, self.result)):
            return "an index stands twice in one operand"
        if not set(self.result) <= set(self.x + self.weight):
            return "its result has an index of no operand"
        lost = [i for i in self.x + self.weight if (i in self.x) != (i in self.weight) and i not in self.result]
        if lost:
            return f"it sums over {lost[0]!r}, an index of one operand alone"
        if not self.summed:
            return "it sums over no index"
        return "" if self.columns else "its weight has no index of its own: a vector, or one for each row"


def pair_einsums(model: ir.Model, decide: Decide) -> None:
    """Take Einsums of several operands, constants among them, apart into Einsums of two.

    From the left, as ONNX Runtime computes them, but an activation first, so that constants meet what they multiply:
    'bhts,bshe,hed->btd' is 'bhts,bshe->bhte' and 'bhte,hed->btd'. Between two stay the indices that an operand to come
    or the result has. Equations with '...', or with an index twice in one operand, stay.
    """
    names, changed = Names(model), 0
    for node in list(model.graph.all_nodes()):
        if (node.op_type, node.domain) != ("Einsum", "") or len(node.inputs) < 3:
            continue
        terms, result = _told(node)
        plain = all("." not in term and len(set(term)) == len(term) for term in (*terms, result))
        if plain and len(terms) == len(node.inputs) and any(map(_is_factor, node.inputs)):
            _pair(Writer(node, names, model.graph), list(zip(node.inputs, terms, strict=True)), result)
            changed += 1
    if changed:
        decide("", "parted", f"{changed} Einsums of several operands became Einsums of two", nodes=changed)


def _pair(write: Writer, operands: list[tuple[ir.Value | None, str]], result: str) -> None:
    first = next((i for i, (value, _) in enumerate(operands) if not is_constant(value)), 0)
    value, own = operands.pop(first)
    for i, (other, term) in enumerate(operands, 1):
        later = result + "".join(term for _, term in operands[i:])
        joined = "".join(index for index in dict.fromkeys(own + term) if index in later)
        joined, what = (joined, f"pair{i}") if i < len(operands) else (result, "")
        value = write.op("Einsum", [value, other], what, {"equation": f"{own},{term}->{joined}"})
        own = joined
    write.end(value)


def _told(node: ir.Node) -> tuple[list[str], str]:
    """The indices of the operands and of the result, which an equation may leave to be told."""
    terms, arrow, result = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    if not arrow:
        letters = sorted(set(terms) - set(",."))
        result = "..." * ("..." in terms) + "".join(i for i in letters if terms.count(i) == 1)
    return terms.split(","), result


def turn_einsums(model: ir.Model, decide: Decide) -> int:
    """Write Einsums of one activation and one constant as MatMul with Transpose and Reshape.

    Case 1: the constant is the second or the first operand; its indices may be in any order, several may be summed
            over (attention heads that are joined), several may be columns (heads that are parted).
    Case 2: an index of both operands and the result is a batch: a matrix for each index, (…, K, N).
    Others stay, with their reason. The weight is turned by nodes that `fold_constants` makes constants of.
    Returns how many were changed.
    """
    names, fixed, changed = Names(model), decided(model), 0
    for node in list(model.graph.all_nodes()):
        if (node.op_type, node.domain) != ("Einsum", "") or fixed.issuperset(node.inputs):
            continue
        if not any(_is_factor(value) for value in node.inputs):
            continue
        found = _product(node)
        if isinstance(found, str):
            reason = f"the Einsum {node.attributes['equation'].as_string()!r} is no matrix product: {found}"
            set_node(node, left=reason)
            decide(node.name or "", "skipped", reason)
        else:
            _write(Writer(node, names, model.graph), *found)
            changed += 1
    if changed:
        decide("", "turned", f"{changed} Einsums of a constant weight became MatMul", nodes=changed)
    return changed


def _is_factor(value: ir.Value | None) -> bool:
    if value is None or value.const_value is None:
        return False
    return is_constant(value) and value.const_value.dtype in FLOATS


def _product(node: ir.Node) -> tuple[ir.Value, ir.Value, _Product] | str:
    """Activation, weight and the product of them; or why it is none."""
    if len(node.inputs) != 2:
        return f"it has {len(node.inputs)} operands"
    position = 1 if _is_factor(node.inputs[1]) else 0
    x, weight = node.inputs[1 - position], node.inputs[position]
    assert x is not None
    assert weight is not None
    halves, result = _told(node)
    if len(halves) != 2:
        return "its equation is not one of two operands"
    own, other = halves[position], halves[1 - position]
    shape = dimensions(weight)
    if "..." in own and len(own) - 3 == len(shape):
        own = own.replace("...", "")
    if "..." in own or len(own) != len(shape):
        return "the indices of its weight are not told one by one"
    if "..." in other:
        if x.shape is None:
            return "the rank of its input is unknown"
        unused = [letter for letter in ascii_letters if letter not in own + other][: len(x.shape) - len(other) + 3]
        other, result = (term.replace("...", "".join(unused)) for term in (other, result))
    return _checked(x, weight, _Product(other, own, result, dict(zip(own, shape, strict=True))))


def _checked(x: ir.Value, weight: ir.Value, product: _Product) -> tuple[ir.Value, ir.Value, _Product] | str:
    problem = product.problem()
    if problem:
        return problem
    if x.shape is not None and len(x.shape) != len(product.x):
        return "its equation does not fit its input"
    for index, size in zip(product.x, x.shape or [None] * len(product.x), strict=True):
        wanted = product.sizes.get(index)
        if wanted is not None and size != wanted and (isinstance(size, int) or wanted == 1):
            return f"{index!r} may have other sizes in its operands"
    return x, weight, product


def _write(write: Writer, x: ir.Value, weight: ir.Value, product: _Product) -> None:
    free, batch, rows, summed, columns = product.free, product.batch, product.rows, product.summed, product.columns
    sizes = product.sizes
    turned = write.transpose(weight, _order(product.weight, batch + summed + columns), "weight_transposed")
    matrix = (prod(sizes[i] for i in summed), prod(sizes[i] for i in columns))
    turned = write.reshape(turned, [*(sizes[i] for i in batch), *matrix], "weight")
    x = write.transpose(x, _order(product.x, rows + summed), "input_transposed")
    if len(summed) > 1:
        x = write.reshape(x, [0] * len(rows) + [matrix[0]], "input_joined")
    alone = bool(batch) and not free  # a row for each matrix of the batch
    x = write.unsqueeze(x, [len(batch)] if alone else [], "input_rows")
    result = write.op("MatMul", [x, turned])
    result = write.squeeze(result, [len(batch)] if alone else [], "output_rows")
    if len(columns) > 1:
        result = write.reshape(result, [0] * len(rows) + [sizes[i] for i in columns], "output_parted")
    write.end(write.transpose(result, _order(rows + columns, product.result), "output_transposed"))


def _order(given: Sequence[str], wanted: str) -> list[int]:
    return [given.index(index) for index in wanted]
