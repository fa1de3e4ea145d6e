"""``routed_softmax``: causal attention over the own chunk and the earlier chunks that the router kept."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from natsl.kernels import reference
from natsl.kernels.dispatch import (
    Limits,
    check_counterfactual,
    check_heads,
    check_routes,
    check_shape,
    check_tensors,
    packed_lengths,
    use_kernels,
)
from natsl.kernels.shape import LARGEST_GRID, LARGEST_KEY_DIM, LARGEST_VALUE_DIM

LIMITS = Limits({"Ks": LARGEST_KEY_DIM, "Vs": LARGEST_VALUE_DIM, "batch": LARGEST_GRID})


def routed_softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    route: Tensor,
    *,
    chunk_size: int,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    counterfactual: str = "none",
    counterfactual_rate: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Attend to {s ≤ t in the own chunk} ∪ {s in earlier chunks with route 1}.

    q [B,T,Hq,Ks], k [B,T,Hs,Ks], v [B,T,Hs,Vs], any floating dtype, the same for all three; route [B,N,R] of 0/1
    (reals in [0, 1] on the torch backend: an earlier key then weighs route · exp(score)), N = ceil(T / chunk_size).
    Key head h uses routing head h // (Hs // R); Hq is a multiple of Hs (grouped queries). ``scale`` defaults to
    Ks^-½. ``cu_seqlens`` int32 [sequences + 1] packs sequences into B = 1; N then counts the chunks of all of them in
    order.

    route.grad: ``counterfactual="none"`` for kept chunks only (as published); ``derivative`` the exact derivative
    everywhere; ``insertion`` the bounded exact effect of inserting a chunk that was left out. ``counterfactual_rate``
    in (0, 1] samples that share of the left-out chunks, unbiased.

    On Triton: float32, float16, bfloat16, chunk_size 16 to 128, Ks ≤ 256, Vs ≤ 512, scale > 0 (beyond any of these
    ``auto`` takes torch and warns), and ``cu_seqlens`` is trusted, not read.

    NaN and overflow are not hidden: as in dense attention they may reach other queries of the same matrix product.

    Returns o [B,T,Hq,Vs] in q's dtype. Raises ``ValueError`` naming the argument. Source: arXiv 2602.03681, section 3.
    """
    op = "routed_softmax"
    heads = {"q": q, "k": k, "v": v}
    check_tensors(op, {**heads, "route": route})
    check_heads(op, heads, chunk_size)
    B, T, Hq, Ks = q.shape
    Hs = k.shape[2]
    check_shape(op, "k", k, (B, T, Hs, Ks))
    check_shape(op, "v", v, (B, T, Hs, v.shape[3]))
    if Hq % Hs:
        raise ValueError(f"{op}: {Hq} query heads are not a multiple of {Hs} key heads")
    if route.dim() != 3 or Hs % max(route.shape[2], 1):
        raise ValueError(
            f"{op}: route {tuple(route.shape)} must be [batch, chunks, routing heads], heads dividing {Hs}"
        )
    check_counterfactual(op, counterfactual, counterfactual_rate)
    scale = Ks**-0.5 if scale is None else scale
    check_routes(op, {"route": route}, q, route.shape[2], cu_seqlens, chunk_size)

    limit = LIMITS.reason(q.dtype, chunk_size, {"Ks": Ks, "Vs": v.shape[3], "batch": max(1, B)})
    if limit is None and not scale > 0.0:
        limit = f"scale = {scale!r} is not supported by the triton backend: it must be > 0"
    if use_kernels(op, backend, q.device, limit):
        # here and not at the top: natsl must import where triton is not installed
        from natsl.kernels._triton import softmax as softmax_triton

        return softmax_triton.routed_softmax(
            q, k, v, route, cu_seqlens, chunk_size, scale, counterfactual, counterfactual_rate
        )

    run = partial(
        reference.routed_softmax,
        chunk_size=chunk_size,
        scale=scale,
        counterfactual=counterfactual,
        counterfactual_rate=counterfactual_rate,
    )
    if cu_seqlens is None:
        return run(q, k, v, route)
    lengths, chunks = packed_lengths(op, {"route": route}, T, cu_seqlens, chunk_size)
    parts = zip(*(x.split(lengths, 1) for x in (q, k, v)), route.split(chunks, 1), strict=True)
    return torch.cat([run(*part) for part in parts if part[0].shape[1]], 1)
