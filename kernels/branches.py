"""``routed_branches`` and, from a cache, ``continued_branches``: both memories of a layer, on a GPU side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from natsl.kernels.delta import DeltaState, routed_delta_rule
from natsl.kernels.dispatch import (
    Limits,
    check_counterfactual,
    check_heads,
    check_routes,
    check_shape,
    check_tensors,
    packed_lengths,
    split_values,
    use_kernels,
)
from natsl.kernels.pages import KeyPages, PagePlan, paged_softmax
from natsl.kernels.reference import sample, scale_gradient
from natsl.kernels.segment import Split
from natsl.kernels.shape import LARGEST_GRID, LARGEST_KEY_DIM, LARGEST_VALUE_DIM
from natsl.kernels.softmax import routed_softmax

LIMITS = Limits(
    {"K": LARGEST_KEY_DIM, "V": LARGEST_VALUE_DIM, "Ks": LARGEST_KEY_DIM, "sequences · heads": LARGEST_GRID},
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
    delta_route: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    counterfactual: str = "none",
    counterfactual_rate: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run ``routed_delta_rule`` and ``routed_softmax`` over the same values.

    q, k [B,T,R,K], v [B,T,R,V], g, beta [B,T,R] as the delta rule takes them (q and k are normalised inside);
    q_softmax, k_softmax [B,T,Hs,Ks], already normed, with Hs = R·G: softmax head r·G + j reads the j-th slice of v's
    head r. route [B,N,R]: 1 = softmax keeps the chunk; delta_route [B,N,R]: 1 = the delta rule does not write it (None:
    ``route``, so what softmax keeps is not written). With both, a chunk may be kept and written, or neither.
    ``cu_seqlens`` [sequences + 1], int32 or int64, packs sequences into B = 1 as in ``routed_softmax``: nothing crosses
    a border. ``counterfactual`` and its rate are those of ``routed_softmax`` too; one draw per chunk and head samples
    both sides.

    route.grad is that of softmax and delta_route.grad that of the delta rule; without delta_route, route.grad is their
    sum.

    Returns o_delta [B,T,R,V] and o_softmax [B,T,Hs,V/G]. On CUDA the two run on two streams, forward and backward; the
    results are those of two calls. Raises ``ValueError`` naming the argument. Source: arXiv 2602.03681, section 3.
    """
    op = "routed_branches"
    heads = {"q": q, "k": k, "v": v, "q_softmax": q_softmax, "k_softmax": k_softmax}
    routes = {"route": route} if delta_route is None else {"route": route, "delta_route": delta_route}
    check_tensors(op, {**heads, "g": g, "beta": beta, **routes})
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
    sequences = check_routes(op, routes, q, R, cu_seqlens, chunk_size)
    check_counterfactual(op, counterfactual, counterfactual_rate)
    sizes = {"K": K, "V": V, "Ks": Ks, "sequences · heads": max(1, sequences * R)}
    if delta_route is route:  # torch.compile takes no tensor twice as inputs of one node
        delta_route = None
    if not use_kernels(op, backend, q.device, LIMITS.reason(q.dtype, chunk_size, sizes)):
        if cu_seqlens is not None:
            packed_lengths(op, routes, T, cu_seqlens, chunk_size)  # else one of the two ops would name itself
        delta_route = route if delta_route is None else delta_route
        sampling = counterfactual != "none" and counterfactual_rate < 1.0
        if sampling and (route.requires_grad or delta_route.requires_grad):
            weight = sample(route.detach(), counterfactual_rate)  # one draw for both ops, which then sample nothing
            left, erased = route.detach() <= 0, delta_route.detach() >= 1
            route = scale_gradient(route, torch.where(left, weight, 1.0))
            delta_route = scale_gradient(delta_route, torch.where(erased, weight, 1.0))
        options: dict[str, Any] = {
            "chunk_size": chunk_size,
            "cu_seqlens": cu_seqlens,
            "counterfactual": counterfactual,
            "backend": backend,
        }
        o_delta, _ = routed_delta_rule(q, k, v, g, beta, delta_route, **options)
        return o_delta, routed_softmax(q_softmax, k_softmax, split_values(v, Hs), route, **options)
    from natsl.kernels._triton import branches as branches_triton

    route = route.float().contiguous()
    delta_route = None if delta_route is None else delta_route.float().contiguous()
    sampled, written = _gradient_weights(route, delta_route, counterfactual, counterfactual_rate)
    inputs = branches_triton.BranchInputs(q, k, v, q_softmax, k_softmax, g, beta, route, delta_route)
    settings = branches_triton.BranchOptions(chunk_size, K**-0.5, Ks**-0.5)
    return branches_triton.routed_branches(inputs, cu_seqlens, sampled, written, settings, counterfactual)


def continued_branches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_softmax: Tensor,
    k_softmax: Tensor,
    g: Tensor,
    beta: Tensor,
    route: Tensor,
    state: DeltaState,
    pages: Callable[[], KeyPages],
    *,
    chunk_size: int,
    delta_route: Tensor | None = None,
    lengths: Tensor | None = None,
    parts: Split | None = None,
    plan: PagePlan | None = None,
) -> tuple[Tensor, DeltaState, Tensor, KeyPages]:
    """Run ``routed_delta_rule`` from a ``DeltaState`` and ``paged_softmax`` over the same values, without gradients.

    q, k, v, q_softmax, k_softmax, g and beta as in ``routed_branches``; route and delta_route [B,N,R] as there, but of
    the N = ``touched_chunks(T, chunk_size)`` chunks from each row's open one on. lengths [B] int64: real tokens of each
    row, right-padded (default T). ``parts``: see ``routed_delta_rule``; ``plan``: see ``paged_softmax``. Its pages are
    what ``pages`` gives: that is called once the delta rule's kernels run, as it may wait for the device.

    Returns o_delta [B,T,R,V], the state, o_softmax [B,T,Hs,V/G] and the pages after the call. Raises ``ValueError``
    naming the argument. Source: arXiv 2602.03681, section 3.
    """

    def delta() -> tuple[Tensor, DeltaState]:
        o, after = routed_delta_rule(
            q,
            k,
            v,
            g,
            beta,
            route if delta_route is None else delta_route,
            chunk_size=chunk_size,
            initial_state=state,
            output_final_state=True,
            lengths=lengths,
            parts=parts,
        )
        assert isinstance(after, DeltaState)
        return o, after

    def softmax(*_: object) -> tuple[Tensor, KeyPages]:
        return paged_softmax(
            q_softmax,
            k_softmax,
            split_values(v, q_softmax.shape[2]),
            route,
            pages(),
            state.start,
            chunk_size=chunk_size,
            lengths=lengths,
            plan=plan,
            at_border=parts is not None and lengths is None and parts.at_border,
        )

    if not q.is_cuda or q.shape[1] == 1 or parts is None:
        return *delta(), *softmax()
    from natsl.kernels._triton.branches import run_side_by_side

    (o_delta, after), (o_softmax, kept) = run_side_by_side(q, delta, softmax)
    return o_delta, after, o_softmax, kept


def _gradient_weights(
    route: Tensor, delta_route: Tensor | None, counterfactual: str, rate: float
) -> tuple[Tensor, Tensor]:
    """Weights of the routes' gradients [B,N,R]: of the softmax side where it was not chosen, and of the delta side.

    The side that was chosen weighs 1, the other nothing (none; the first result is not read) or an unbiased sample: the
    same one for both sides of a chunk, should neither be chosen.
    """
    route = route.detach()
    left = route <= 0.5  # out by softmax
    written = left if delta_route is None else delta_route <= 0.5
    if counterfactual == "none":
        return route, written
    weight = sample(route, rate)
    return weight * left, torch.where(written, 1.0, weight)
