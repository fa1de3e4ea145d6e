"""Margins → routes: thresholds, calibrated budgets and the hard causal cap.

Shapes: B batch, T tokens, C chunk size, N = ceil(T/C) chunks, R routing heads, D width, P table points.
Everything here is causal: the route of chunk n depends only on chunks ≤ n.
"""

from __future__ import annotations

import torch
from torch import Tensor

from natsl.kernels.dispatch import resolve
from natsl.kernels.reference import cap_limits


def chunk_means(x: Tensor, chunk_size: int, lengths: Tensor | None = None) -> Tensor:
    """Mean of x over the tokens of each chunk; a partial chunk divides by its true count.

    x [B,T,D]; lengths [B] int64, tokens of each sequence that are real (right-padded; default all). Returns [B,N,D];
    a chunk without real tokens gives 0.
    """
    B, T, D = x.shape
    N = -(-T // chunk_size)
    positions = torch.arange(N * chunk_size, device=x.device)
    if lengths is None:
        real = (positions < T).expand(B, -1)
    else:
        real = positions[None, :] < lengths[:, None]
        x = x * real[:, :T, None].to(x.dtype)
    total = torch.nn.functional.pad(x, (0, 0, 0, N * chunk_size - T)).view(B, N, chunk_size, D).sum(2)
    count = real.reshape(B, N, chunk_size).sum(2).clamp(min=1)
    return total / count[:, :, None].to(total.dtype)


def complete_chunks(lengths: Tensor, chunk_size: int, n_chunks: int) -> Tensor:
    """Which chunks are complete: lengths [B] → bool [B,N]."""
    return torch.arange(n_chunks, device=lengths.device)[None, :] < (lengths // chunk_size)[:, None]


def threshold_routes(margins: Tensor, threshold: Tensor | float) -> Tensor:
    """Route to softmax where the margin exceeds the threshold.

    margins [B,N,R]; threshold broadcastable to it (a number, [R], [B,1,R]). Returns float 0/1 [B,N,R]. A lower
    threshold keeps a superset of chunks, so budgets are nested; +inf keeps none and −inf all.
    """
    return (margins > threshold).to(margins.dtype)


def cap_routes(route: Tensor, cap: float, burst: int = 0) -> Tensor:
    """Enforce the hard limit: chunk n is kept only if the number kept before is < ceil(cap·(n+1)) + burst.

    route [B,N,R] of 0/1, the chunks that are wanted. Returns 0/1 [B,N,R]. The sequential rule is K_n = min(K_{n−1} +
    w_n, L_n) with the rising limit L_n, so K_n = W_n + min(0, min_{j ≤ n}(L_j − W_j)) with W the cumulative sum of w:
    no loop. Which chunks a cap leaves out is first come first served; a larger budget under the same cap is not
    nested.
    """
    _check_cap(cap, burst)
    limit = cap_limits(route.shape[1], cap, burst, route.device)[None, :, None]
    wanted = (route > 0.5).to(torch.int64)
    total = wanted.cumsum(1)
    kept = total + (limit - total).cummin(1).values.clamp(max=0)
    return kept.diff(dim=1, prepend=torch.zeros_like(kept[:, :1])).to(route.dtype)


def _check_cap(cap: float, burst: int) -> None:
    if not 0.0 <= cap <= 1.0:
        raise ValueError(f"cap = {cap!r} is not allowed: it must lie in [0, 1]")
    if burst < 0:
        raise ValueError(f"burst = {burst!r} is not allowed: it must be ≥ 0")


def route_margins(
    margins: Tensor, threshold: Tensor | float, cap: float | None, burst: int = 0, backend: str = "auto"
) -> Tensor:
    """Threshold the margins and, unless ``cap`` is None, enforce the hard limit on what is kept.

    margins [B,N,R]; threshold broadcastable to it. The same as ``threshold_routes`` and ``cap_routes`` one after the
    other, bit for bit; with a cap one kernel on CUDA. Returns float 0/1 [B,N,R] in margins' dtype, without a gradient.
    Raises ``ValueError`` for a cap or a burst outside its range.
    """
    name = resolve(backend, "route_margins", margins.device)
    if cap is None:
        return threshold_routes(margins.detach(), threshold)
    _check_cap(cap, burst)
    if name == "triton":
        from natsl.kernels._triton.routing import capped_routes

        return capped_routes(margins, threshold, cap, burst)
    return cap_routes(threshold_routes(margins.detach(), threshold), cap, burst)


def quantile_table(margins: Tensor, points: int) -> Tensor:
    """Calibration table of one layer: ascending quantiles of margins [M,R] at P even levels; returns [P,R]."""
    levels = torch.linspace(0.0, 1.0, points, dtype=torch.float64, device=margins.device)
    return torch.quantile(margins.to(torch.float64), levels, dim=0)


def budget_threshold(table: Tensor, budget: float) -> Tensor:
    """Threshold θ(budget) by linear interpolation in a calibration table.

    table [R,P] ascending quantiles of the margins. Returns [R]: the quantile 1 − budget; budget 0 gives +inf (keep
    nothing) and budget 1 gives −inf (keep everything).
    """
    if not 0.0 <= budget <= 1.0:
        raise ValueError(f"budget = {budget!r} is not allowed: it must lie in [0, 1]")
    if budget in (0.0, 1.0):
        return torch.full_like(table[:, 0], float("inf") if budget == 0.0 else float("-inf"))
    place = (1.0 - budget) * (table.shape[1] - 1)
    low = min(int(place), table.shape[1] - 2)
    return torch.lerp(table[:, low], table[:, low + 1], place - low)
