"""Mixtures of experts as a static graph: every expert on every token, weighted by what the router gave it."""

from typing import Any

NAME = "qcompile_static"


def make_static(model: Any) -> bool:
    """Have a transformers model compute its experts by `static_experts`; False where its experts cannot be set.

    Exact, but for rounding: an expert that the router did not choose counts with weight 0. Loops over the chosen
    experts, which transformers runs by default, depend on the data and cannot be exported; gathering each token's
    weights can, but takes a copy of them a token.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if not any(hasattr(module, "_is_expert_parallel") for module in model.modules()):
        return False
    ALL_EXPERTS_FUNCTIONS.register(NAME, static_experts)
    model.set_experts_implementation(NAME)
    return True


def static_experts(experts: Any, hidden: Any, chosen: Any, weights: Any) -> Any:
    """hidden (T, K) through all E experts, each (E, K, N) weight in one product; chosen, weights: (T, top k)."""
    import torch

    count = experts.down_proj.shape[0]
    shares = torch.nn.functional.one_hot(chosen, count).to(weights.dtype) * weights.unsqueeze(-1)
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    inner = _product(experts, hidden.unsqueeze(0), up)
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    outer = _product(experts, inner, "down_proj")
    if experts.has_post_expert_norm:
        outer = experts.post_expert_norm(outer)
    return (outer * shares.sum(1).transpose(0, 1).unsqueeze(-1)).sum(0).to(hidden.dtype)


def _product(experts: Any, x: Any, name: str) -> Any:
    """x (1 or E, T, K) by the weight `name` of every expert, stored (E, N, K), or (E, K, N) where transposed."""
    weight = getattr(experts, name)
    y = x @ (weight if experts.is_transposed else weight.transpose(1, 2))
    return y + getattr(experts, f"{name}_bias").unsqueeze(1) if experts.has_bias else y
