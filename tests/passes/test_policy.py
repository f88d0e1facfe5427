"""passes/policy.py: who is quantized to what, and the reasons of those who are not."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.models.tiny import tiny_decoder
from qcompile.models.tiny.build import Builder
from qcompile.passes.linears import find_embeddings, find_linears, vocabulary_size
from qcompile.passes.policy import Policy
from qcompile.passes.spec import PerGroup, QuantSpec

BODY, HEAD, TABLE = QuantSpec(4, PerGroup(32)), QuantSpec(8, PerGroup(64)), QuantSpec(8, PerGroup(16))
MODEL = tiny_decoder(layers=1)
LINEARS = {linear.name: linear for linear in find_linears(MODEL.graph)}
(EMBEDDING,) = find_embeddings(MODEL.graph)
Q_PROJ = "model.layers.0.self_attn.q_proj"


def _answers(policy: Policy) -> dict[str, QuantSpec | str]:
    vocabulary = vocabulary_size(MODEL)
    return {name: policy.for_linear(linear, vocabulary) for name, linear in LINEARS.items()}


def test_body_head_and_embedding_have_specs_of_their_own() -> None:
    policy = Policy(BODY, HEAD, TABLE)
    assert _answers(policy) == {name: HEAD if name == "lm_head" else BODY for name in LINEARS}
    assert policy.for_embedding(EMBEDDING) == TABLE


def test_none_keeps_them_with_a_reason() -> None:
    policy = Policy(BODY, None, None)
    assert _answers(policy)["lm_head"] == "lm_head is kept in float"
    assert policy.for_embedding(EMBEDDING) == "embedding is kept in float"
    assert _answers(policy)[Q_PROJ] == BODY


@pytest.mark.parametrize("pattern", [Q_PROJ, "*q_proj", "*.q_proj.weight", "*[q]_proj*"])
def test_exclude_matches_node_or_weight_names(pattern) -> None:
    answers = _answers(Policy(BODY, HEAD, TABLE, exclude=("nothing", pattern)))
    assert answers.pop(Q_PROJ) == f"excluded by {pattern!r}"
    assert not any(isinstance(answer, str) for answer in answers.values())


def test_patterns_are_whole_names_and_mind_case() -> None:
    for pattern in ("q_proj", "*Q_PROJ*", "*.q_proj.weigh"):
        assert _answers(Policy(BODY, HEAD, TABLE, exclude=(pattern,)))[Q_PROJ] == BODY


@pytest.mark.parametrize(("rows", "taken"), [(64, 64), (192, 64), (96, 32)])
def test_targets_with_whole_blocks_get_such_as_divide_the_rows(rows: int, taken: int) -> None:
    policy = Policy(QuantSpec(4, PerGroup(64), symmetric=True), None, None, target="tensorrt")
    (linear,) = find_linears(_product(rows).graph)
    spec = policy.for_linear(linear, None)
    assert spec == QuantSpec(4, PerGroup(taken), symmetric=True)


def test_rows_that_no_block_of_the_target_divides_stay_in_float() -> None:
    policy = Policy(QuantSpec(4, PerGroup(64), symmetric=True), None, None, target="qnn")
    (linear,) = find_linears(_product(80).graph)
    assert "takes whole blocks, and 80 rows are no multiple of 32" in str(policy.for_linear(linear, None))


def _product(rows: int) -> ir.Model:
    b = Builder(opset=21)
    weight = b.weight("weight", np.ones((rows, 32), np.float32))
    return b.model({"y": b.MatMul(b.input("x", ir.DataType.FLOAT, [2, rows]), weight, name="product")})


def test_include_leaves_the_others_out() -> None:
    policy = Policy(BODY, HEAD, TABLE, include=("*mlp*", "lm_head"))
    quantized = {name for name, answer in _answers(policy).items() if isinstance(answer, QuantSpec)}
    assert quantized == {name for name in LINEARS if ".mlp." in name or name == "lm_head"}
    assert _answers(policy)[Q_PROJ] == "not among the included names"
    assert policy.for_embedding(EMBEDDING) == "not among the included names"


def test_exclude_wins_over_include_and_reaches_the_embedding() -> None:
    policy = Policy(BODY, HEAD, TABLE, include=("*",), exclude=("model.embed_tokens.weight",))
    reason = "excluded by 'model.embed_tokens.weight'"
    assert policy.for_embedding(EMBEDDING) == reason
    assert _answers(policy)["lm_head"] == reason, "the tied head is the same weight"
    assert _answers(policy)[Q_PROJ] == BODY


def test_the_first_pattern_of_a_weight_says_its_grid() -> None:
    """Of a linear, the head and the embedding alike; None leaves it in float, `exclude` wins."""
    other = QuantSpec(6, PerGroup(32))
    named = ((Q_PROJ, None), ("*q_proj*", other), ("*k_proj*", other), ("lm_head", BODY), ("*embed_tokens*", BODY))
    policy = Policy(BODY, HEAD, TABLE, named=named, exclude=("*v_proj*",))
    answers = _answers(policy)
    assert answers.pop(Q_PROJ) == f"kept in float by {Q_PROJ!r}"
    assert answers.pop("model.layers.0.self_attn.k_proj") == other
    assert answers.pop("model.layers.0.self_attn.v_proj") == "excluded by '*v_proj*'"
    assert set(answers.values()) == {BODY}
    assert policy.for_embedding(EMBEDDING) == BODY


def test_a_router_that_a_pattern_names_has_the_format_it_says() -> None:
    """Not 8 bits, which are for those that nobody named."""
    model = tiny_decoder(layers=1)
    linear = next(iter(find_linears(model.graph)))
    policy = Policy(BODY, None, None, named=((linear.name, TABLE),))
    assert policy.remark(linear, None) == ""
    assert policy.for_linear(linear, None) == TABLE
