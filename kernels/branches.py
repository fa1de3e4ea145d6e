"""``routed_branches``: both memories of a routed layer in one call, at the same time on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from natsl.kernels.delta import routed_delta_rule
from natsl.kernels.dispatch import (
    Limits,
    check_counterfactual,
    check_heads,
    check_shape,
    check_tensors,
    count_chunks,
    split_values,
    use_kernels,
)
from natsl.kernels.reference import sample
from natsl.kernels.shape import LARGEST_GRID, LARGEST_KEY_DIM, LARGEST_VALUE_DIM
from natsl.kernels.softmax import routed_softmax

LIMITS = Limits(
    {"K": LARGEST_KEY_DIM, "V": LARGEST_VALUE_DIM, "Ks": LARGEST_KEY_DIM, "batch · heads": LARGEST_GRID},
    chunk_keys=True,
)


def routed_branches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_softmax: Tensor,
    k_softmax: Tensor,
    g: Tensor,
    beta: Tensor,
    route: Tensor,
    *,
    chunk_size: int,
    counterfactual: str = "none",
    counterfactual_rate: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run ``routed_delta_rule`` and ``routed_softmax`` over the same values.

    q, k [B,T,R,K], v [B,T,R,V], g, beta [B,T,R] as the delta rule takes them (q and k are normalised inside);
    q_softmax, k_softmax [B,T,Hs,Ks], already normed, with Hs = R·G: softmax head r·G + j reads the j-th slice of v's
    head r. route [B,N,R]; ``counterfactual`` and its rate as in ``routed_softmax``.

    Returns o_delta [B,T,R,V] and o_softmax [B,T,Hs,V/G]. On CUDA the two run on two streams, forward and backward; the
    results are those of two calls. Raises ``ValueError`` naming the argument. Source: arXiv 2602.03681, section 3.
    """
    op = "routed_branches"
    heads = {"q": q, "k": k, "v": v, "q_softmax": q_softmax, "k_softmax": k_softmax}
    check_tensors(op, {**heads, "g": g, "beta": beta, "route": route})
    check_heads(op, heads, chunk_size)
    B, T, R, K = q.shape
    V, Hs, Ks = v.shape[3], *q_softmax.shape[2:]
    if Hs % R or V % (Hs // R):
        raise ValueError(f"{op}: {Hs} softmax heads must be a multiple of {R} heads and divide their {V} value columns")
    check_shape(op, "k", k, (B, T, R, K))
    check_shape(op, "v", v, (B, T, R, V))
    check_shape(op, "k_softmax", k_softmax, (B, T, Hs, Ks))
    check_shape(op, "g", g, (B, T, R))
    check_shape(op, "beta", beta, (B, T, R))
    check_shape(op, "route", route, (B, *count_chunks([T], chunk_size), R))
    check_counterfactual(op, counterfactual, counterfactual_rate)
    sizes = {"K": K, "V": V, "Ks": Ks, "batch · heads": max(1, B * R)}
    if not use_kernels(op, backend, q.device, LIMITS.reason(q.dtype, chunk_size, sizes)):
        options = {"counterfactual": counterfactual, "counterfactual_rate": counterfactual_rate, "backend": backend}
        o_delta, _ = routed_delta_rule(q, k, v, g, beta, route, chunk_size=chunk_size, **options)  # type: ignore[arg-type]
        values = split_values(v, Hs)
        o_softmax = routed_softmax(q_softmax, k_softmax, values, route, chunk_size=chunk_size, **options)  # type: ignore[arg-type]
        return o_delta, o_softmax
    from natsl.kernels._triton import branches as branches_triton

    route = route.float().contiguous()
    sampled, written = _gradient_weights(route.detach(), counterfactual, counterfactual_rate)
    inputs = branches_triton.BranchInputs(q, k, v, q_softmax, k_softmax, g, beta, route)
    settings = branches_triton.BranchOptions(chunk_size, K**-0.5, Ks**-0.5)
    return branches_triton.routed_branches(inputs, sampled, written, settings, counterfactual)


def _gradient_weights(route: Tensor, counterfactual: str, rate: float) -> tuple[Tensor, Tensor]:
    """Weights of the routes' gradient [B,N,R]: of the softmax side where it was not chosen, and of the delta side.

    The side that was chosen weighs 1, the other nothing (none; the first result is not read) or an unbiased sample.
    """
    unchosen = route <= 0.5  # by softmax
    if counterfactual == "none":
        return route, unchosen
    weight = sample(route, rate)
    return weight * unchosen, torch.where(unchosen, 1.0, weight)
