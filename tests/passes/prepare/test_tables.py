"""passes/prepare/tables.py: one stored table, whichever way its lookups and the head go round it."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from preparing import check, parse, prepare

from qcompile.passes.linears import find_embeddings, find_linears

# Larger than what is folded into a second constant without asking.
V, K = 1200, 32
FEEDS = {"ids": np.array([[3, 39, 0, 3], [7, 7, 1, 2]])}


def _chain(turns: int, identities: int, end: str) -> tuple[str, str]:
    """Nodes that lead from w through so many Transposes and Identities, and the value at the end."""
    nodes, value = [], "w"
    for i in range(turns + identities):
        operator = "Identity" if i < identities else "Transpose"
        nodes.append(f"{end}{i} = {operator}({value})")
        value = f"{end}{i}"
    return " ".join(nodes), value


chains = st.tuples(st.integers(0, 3), st.integers(0, 2))


@settings(max_examples=40, deadline=None)
@given(chains, chains, st.booleans(), st.booleans())
def test_every_way_round_ends_at_one_table(
    lookup: tuple[int, int], head: tuple[int, int], stored_by_columns: bool, gemm: bool
) -> None:
    """Whatever turns what: one constant (V, K), a lookup of its rows, and one product by its Transpose."""
    table = np.random.default_rng(0).standard_normal((V, K)).astype(np.float32)
    w = np.ascontiguousarray(table.T) if stored_by_columns else table
    (looked, t), (multiplied, m) = _chain(*lookup, "t"), _chain(*head, "m")
    rows = stored_by_columns == (lookup[0] % 2 == 1)  # the value t is (V, K)
    get = f"g = Gather <axis = {int(not rows)}> ({t}, ids)"
    if not rows:
        get += " r = Transpose <perm = [1, 2, 0]> (g)"
    hidden = "g" if rows else "r"
    turned = stored_by_columns == (head[0] % 2 == 1)  # the value m is (V, K)
    flat = f"f = Reshape({hidden}, flat) y = Gemm <transB = {int(turned)}> (f, {m})"
    product = f"z = Transpose({m}) y = MatMul({hidden}, z)" if turned else f"y = MatMul({hidden}, {m})"
    body = " ".join((looked, multiplied, get, flat if gemm else product))
    model = parse(body, "int64[b, s] ids", f"float[{'r' if gemm else 'b, s'}, n] y", w=w, flat=np.array([-1, K]))
    check(model, FEEDS)
    matrices = [value for value in model.graph.initializers.values() if len(value.shape) == 2]
    assert [tuple(value.shape) for value in matrices] == [(V, K)]
    (embedding,), (linear,) = find_embeddings(model.graph), find_linears(model.graph)
    assert embedding.table is linear.weight is matrices[0]
    assert linear.shape == (K, V)


def test_most_lookups_decide_and_constant_ones_do_not_count() -> None:
    """Rows of w^T are looked up twice, rows of w once; parts of a weight are no lookups."""
    w = np.random.default_rng(0).standard_normal((K, K)).astype(np.float32)
    body = "c = Gather(w, ids) t = Transpose(w) a = Gather(t, ids) b = Gather(t, more) d = Add(a, b) y = Add(c, d)"
    model = parse(body, "int64[b, s] ids, int64[b, s] more", "float[b, s, n] y", w=w)
    check(model, {"ids": FEEDS["ids"] % K, "more": FEEDS["ids"][::-1] % K})
    tables = [embedding.table.const_value.numpy() for embedding in find_embeddings(model.graph)]
    assert sum(np.array_equal(table, w.T) for table in tables) == 2
    model = parse("t = Transpose(w) p = Gather(t, some) y = MatMul(x, p)", "float[b, 3] x", "float[b, n] y",
                  w=w, some=np.array([0, 1, 2]))  # fmt: skip
    prepare(model)
    (linear,) = find_linears(model.graph)
    assert linear.shape == (3, K)
