"""Margins → routes: thresholds, calibrated budgets and hard causal limits.

Shapes: B batch, T tokens, C chunk size, N = ceil(T/C) chunks, R routing heads, D width, P table points.
Everything here is causal: the route of chunk n depends only on chunks ≤ n.
"""

from __future__ import annotations

import torch
from torch import Tensor

from natsl.kernels.dispatch import check_shape, check_tensors, resolve
from natsl.kernels.segment import align, check_counts, ends, running_sum, touched_chunks


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


def continued_means(
    x: Tensor,
    start: Tensor,
    total: Tensor,
    chunk_size: int,
    lengths: Tensor | None = None,
    *,
    at_border: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean of x over each touched chunk, and the sum over the chunk that is then open: ``chunk_means`` in pieces.

    x [B,T,D], the new tokens; start [B] int64, tokens of the open chunk before them, and total [B,D] their sum, float32
    (float64 for float64 x; zeros before the first token); lengths [B] int64, new tokens of each row that are real
    (right-padded; default all). Returns the means [B,N,D] in x's dtype for N = ``touched_chunks(T, chunk_size)``, a
    partial chunk divided by its true count and 0 for a chunk without tokens, and the new total [B,D]. ``at_border``:
    the caller knows that start is 0 everywhere and all tokens are real, which saves a copy of x. Raises ``ValueError``
    naming the argument.
    """
    op = "continued_means"
    check_tensors(op, {"x": x, "total": total})
    B, T, D = x.shape
    check_shape(op, "total", total, (B, D))
    check_counts(op, {"start": start, "lengths": lengths}, x.device, (B,))
    N = touched_chunks(T, chunk_size)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if at_border:
        full, rest = divmod(T, chunk_size)
        complete = x[:, : full * chunk_size].unflatten(1, (full, chunk_size)).sum(2) / chunk_size
        after = x[:, full * chunk_size :].sum(1, dtype=dtype)
        missing = N - full - (rest > 0)  # chunks that no token of this call is in
        means = [complete, after.to(x.dtype)[:, None] / rest] if rest else [complete]
        if missing:
            means.append(x.new_zeros(B, missing, D))
        return means[0] if len(means) == 1 else torch.cat(means, 1), after
    # a single token needs no slots around it
    chunks = align(x, start, chunk_size, lengths) if T > 1 else align(x, torch.zeros_like(start), 1, lengths)
    sums = chunks.sum(2, dtype=dtype)
    sums = torch.cat((sums[:, :1] + total[:, None].to(dtype), sums[:, 1:]), 1)
    end = ends(start, T, lengths)
    count = (end[:, None] - chunk_size * torch.arange(N, device=x.device)).clamp(1, chunk_size)
    is_open = end[:, None] // chunk_size == torch.arange(N, device=x.device)  # none if that is past the last one
    after = torch.where(is_open[..., None], sums, 0.0).sum(1)
    return sums.to(x.dtype) / count[..., None].to(x.dtype), after


def complete_chunks(lengths: Tensor, chunk_size: int, n_chunks: int) -> Tensor:
    """Which chunks are complete: lengths [B] → bool [B,N]."""
    return torch.arange(n_chunks, device=lengths.device)[None, :] < (lengths // chunk_size)[:, None]


def threshold_routes(margins: Tensor, threshold: Tensor | float) -> Tensor:
    """Route to softmax where the margin exceeds the threshold.

    margins [B,N,R]; threshold broadcastable to it (a number, [R], [B,1,R]). Returns float 0/1 [B,N,R]. A lower
    threshold keeps a superset of chunks, so budgets are nested; +inf keeps none and −inf all.
    """
    return (margins > threshold).to(margins.dtype)


def cap_limits(
    chunks: int, cap: float | Tensor, burst: int | Tensor, device: torch.device, done: Tensor | None = None
) -> Tensor:
    """How many of the first n chunks may be kept, n = 1…``chunks``: ceil(cap·n) + burst, int64 [N] or [B,N].

    cap in [0, 1], a number or float64 [B]; burst ≥ 0, a number or int64 [B]; done int64 [B], chunks completed before:
    n = done + 1…done + ``chunks``. [B,N] is returned if one is a tensor. A cap of 1 limits nothing. Tensors are not
    read, so only numbers are checked: raises ``ValueError`` for one outside its range and for a cap of another dtype.
    """
    if isinstance(cap, Tensor):
        if cap.dtype != torch.float64:  # 0.07 in float32 is a little more than 0.07, and a chunk more of 100
            raise ValueError(f"cap is {cap.dtype}, it must be torch.float64")
        cap = cap[:, None]
    elif not 0.0 <= cap <= 1.0:
        raise ValueError(f"cap = {cap!r} is not allowed: it must lie in [0, 1]")
    if isinstance(burst, Tensor):
        burst = burst[:, None]
    elif burst < 0:
        raise ValueError(f"burst = {burst!r} is not allowed: it must be ≥ 0")
    n = torch.arange(1, chunks + 1, device=device, dtype=torch.float64)
    if done is not None:
        n = n + done[:, None]
    # 1e-9 keeps a product such as 0.07·100 = 7.000000000000001 from rounding up to the next integer
    return torch.ceil(cap * n - 1e-9).to(torch.int64) + burst


def limit_routes(route: Tensor, limits: Tensor, kept: Tensor | None = None) -> Tensor:
    """Enforce hard limits: chunk n is kept only if the number kept before is < limits[n].

    route [B,N,R] of 0/1, the chunks that are wanted; limits ≥ 0 and never falling along a row, integers broadcastable
    to [B,N]. Returns 0/1 [B,N,R]. The sequential rule is K_n = min(K_{n−1} + w_n, L_n) with the rising limit L_n, so
    K_n = W_n + min(0, min_{j ≤ n}(L_j − W_j)) with W the cumulative sum of w: no loop. Which chunks a limit leaves out
    is first come first served; a larger budget under the same limits is not nested.

    kept int64 [B,R]: complete chunks kept before these, K_0. The limit is then max(L_n, K_0), so that one that was
    lowered takes back nothing.
    """
    wanted = (route > 0.5).to(torch.int64)
    total = running_sum(wanted)
    limits = limits.expand(route.shape[:2])[:, :, None]
    if kept is not None:
        limits = (limits - kept[:, None]).clamp(min=0)
    slack = (limits - total).transpose(1, 2).contiguous().cummin(2).values.transpose(1, 2)
    count = total + slack.clamp(max=0)
    return count.diff(dim=1, prepend=torch.zeros_like(count[:, :1])).to(route.dtype)


def route_margins(
    margins: Tensor,
    threshold: Tensor | float,
    limits: Tensor | None = None,
    kept: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Threshold the margins and, unless ``limits`` is None, enforce these on what is kept.

    margins [B,N,R]; threshold broadcastable to it; limits int32 or int64, broadcastable to [B,N], as ``cap_limits``
    makes them and ``limit_routes`` reads them. The same as ``threshold_routes`` and ``limit_routes`` one after the
    other, bit for bit; with limits one kernel on CUDA. kept int64 [B,R], chunks kept before, as in ``limit_routes``.
    Returns float 0/1 [B,N,R] in margins' dtype, without a gradient. Raises ``ValueError`` for limits or kept of another
    kind or shape.
    """
    op = "route_margins"
    name = resolve(backend, op, margins.device)
    if kept is not None:
        check_counts(op, {"kept": kept}, margins.device, (margins.shape[0], margins.shape[2]))
    if limits is None:
        return threshold_routes(margins.detach(), threshold)
    _check_limits(limits, margins)
    if name == "triton":
        from natsl.kernels._triton.routing import capped_routes

        return capped_routes(margins, threshold, limits, kept)
    return limit_routes(threshold_routes(margins.detach(), threshold), limits, kept)


def _check_limits(limits: Tensor, margins: Tensor) -> None:
    if not isinstance(limits, Tensor) or limits.dtype not in (torch.int32, torch.int64):
        kind = limits.dtype if isinstance(limits, Tensor) else type(limits).__name__
        raise ValueError(f"route_margins: limits must be an integer tensor, int32 or int64, found {kind}")
    if limits.device != margins.device:
        raise ValueError(f"route_margins: limits is on {limits.device}, but margins is on {margins.device}")
    sizes, shape = tuple(margins.shape[:2]), tuple(limits.shape)
    fits = all(size in (1, whole) for size, whole in zip(reversed(shape), reversed(sizes), strict=False))
    if len(shape) > 2 or not fits:
        raise ValueError(f"route_margins: limits has shape {shape}, it must be broadcastable to {sizes}")


def quantile_table(margins: Tensor, levels: Tensor) -> Tensor:
    """Calibration table of one layer: the quantiles of margins [M,R] at ``levels`` [P], float64 from 0 to 1.

    Returns float64 [P,R], NaN for a head with a NaN. The same as ``torch.quantile``, which has a bound on M. Raises
    ``ValueError`` for M = 0.
    """
    if margins.shape[0] == 0:
        raise ValueError("quantile_table: no margins")
    ordered = margins.to(torch.float64).sort(0).values  # NaN last
    place = levels * (margins.shape[0] - 1)
    low, high = place.to(torch.int64), place.ceil().to(torch.int64)
    table = torch.lerp(ordered[low], ordered[high], (place - low)[:, None])
    return table.masked_fill(ordered[-1].isnan(), float("nan"))


def budget_threshold(table: Tensor, levels: Tensor, budget: Tensor) -> Tensor:
    """Thresholds θ(budget) by linear interpolation in calibration tables.

    table [...,P] quantiles of the margins at ``levels`` [P], which rise from 0 to 1; budget float64 [...], as levels.
    The leading dimensions broadcast. Returns [...] in table's dtype: the quantile 1 − budget; budget 0 gives +inf (keep
    nothing) and budget 1 gives −inf (keep everything).
    """
    level = (1.0 - budget).contiguous()
    low = (torch.searchsorted(levels, level, right=True) - 1).clamp(0, levels.shape[0] - 2)
    weight = (level - levels[low]) / (levels[low + 1] - levels[low])
    shape = torch.broadcast_tensors(table[..., 0], budget)[0].shape  # broadcast_shapes imports SymPy
    ends = torch.stack((low, low + 1), -1).expand(*shape, 2)
    below, above = table.expand(*shape, -1).gather(-1, ends).unbind(-1)
    theta = torch.lerp(below, above, weight.to(table.dtype).expand(shape))
    theta = theta.masked_fill(budget <= 0.0, float("inf"))
    return theta.masked_fill(budget >= 1.0, float("-inf"))
