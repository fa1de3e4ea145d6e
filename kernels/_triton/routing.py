# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Routing on the device: capped routes, the lists of kept chunks and the tiles of packed sequences.

Shapes: B batch, T tokens, C chunk size, N chunks, R routing heads, S packed sequences.
Names: p_ pointer, s_ stride, i_ index or bound, n_ count, o_ offsets, b_ block in registers, m_ mask.
Nothing here waits for the device: whatever depends on the routes stays in tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from natsl.kernels.launch.launcher import Launcher
from natsl.kernels.launch.library import register


@triton.jit
def _minimum(a, b):
    return tl.minimum(a, b)


@Launcher
@triton.jit(
    do_not_specialize=[
        "N", "R", "s_margin_b", "s_margin_n", "s_margin_r", "s_threshold_b", "s_threshold_n", "s_threshold_r",
        "s_limit_b", "s_limit_n",
    ]
)  # fmt: skip
def routing_capped_routes_kernel(
    p_margin, p_threshold, p_limit, p_kept, p_route,
    N, R,
    s_margin_b, s_margin_n, s_margin_r, s_threshold_b, s_threshold_n, s_threshold_r, s_limit_b, s_limit_n,
    CONTINUED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Routes [B,N,R], contiguous, from margins and thresholds (expanded) [B,N,R] and limits (expanded) [B,N].

    One program per (b, r). Kept before chunk n: K = W + min(0, min over j < n of L_j − W_j), W the number of chunks
    wanted so far. No row keeps more than N chunks, so a larger limit is read as N and stays within 32 bits. CONTINUED:
    limits hold for kept [B,R] chunks of earlier calls too.
    """
    i_b = (tl.program_id(0) // R).to(tl.int64)
    i_r = (tl.program_id(0) % R).to(tl.int64)
    p_margin += i_b * s_margin_b + i_r * s_margin_r
    p_threshold += i_b * s_threshold_b + i_r * s_threshold_r
    p_limit += i_b * s_limit_b
    p_route += i_b * N * R + i_r
    n_earlier = tl.load(p_kept + tl.program_id(0)) if CONTINUED else 0
    n_wanted = tl.zeros((), tl.int32)
    slack = tl.zeros((), tl.int32)  # min(0, min of L − W over the blocks that are done)
    for i_block in range(0, N, BLOCK):
        o_n = (i_block + tl.arange(0, BLOCK)).to(tl.int64)
        m_n = o_n < N
        b_threshold = tl.load(p_threshold + o_n * s_threshold_n, mask=m_n, other=0.0)
        b_margin = tl.load(p_margin + o_n * s_margin_n, mask=m_n, other=0.0).to(b_threshold.dtype)
        b_wanted = ((b_margin > b_threshold) & m_n).to(tl.int32)
        b_total = n_wanted + tl.cumsum(b_wanted, 0)
        b_limit = tl.load(p_limit + o_n * s_limit_n, mask=m_n, other=0)
        b_previous_limit = tl.load(p_limit + (o_n - 1) * s_limit_n, mask=m_n & (o_n > 0), other=0)
        if CONTINUED:  # one that was lowered takes back nothing
            b_limit = tl.maximum(b_limit - n_earlier, 0)
            b_previous_limit = tl.maximum(b_previous_limit - n_earlier, 0)
        b_limit = tl.minimum(b_limit, N).to(tl.int32)
        b_previous_limit = tl.minimum(b_previous_limit, N).to(tl.int32)
        # L − W of the chunk before; there is none before chunk 0, and past the end nothing may count
        b_slack = tl.where(m_n & (o_n > 0), b_previous_limit - (b_total - b_wanted), 0)
        b_slack = tl.minimum(slack, tl.associative_scan(b_slack, 0, _minimum))
        b_kept = (b_wanted > 0) & (b_total - 1 + b_slack < b_limit)
        tl.store(p_route + o_n * R, b_kept.to(p_route.dtype.element_ty), mask=m_n)
        n_wanted += tl.sum(b_wanted, 0)
        slack = tl.min(b_slack, 0)


@Launcher
@triton.jit(do_not_specialize=["N", "R", "s_route_b", "s_route_n", "s_route_r"])
def routing_kept_chunks_kernel(
    p_route, p_first, p_starts, p_count,
    N, R,
    s_route_b, s_route_n, s_route_r,
    C: tl.constexpr, VARLEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stable partition of the chunks into kept and other ones; outputs as ``kept_chunks`` returns them.

    p_route [B,N,R]; p_first [N] int32, the first token of each chunk, is read only if VARLEN. One program per (b, r).
    """
    i_row = tl.program_id(0).to(tl.int64)
    p_route += (i_row // R) * s_route_b + (i_row % R) * s_route_r
    p_starts += i_row * N
    p_count += i_row * (N + 1)
    n_kept = tl.zeros((), tl.int32)
    for i_block in range(0, N, BLOCK):
        o_n = i_block + tl.arange(0, BLOCK)
        b_route = tl.load(p_route + o_n.to(tl.int64) * s_route_n, mask=o_n < N, other=0.0)
        n_kept += tl.sum((b_route > 0.5).to(tl.int32), 0)
    n_before = tl.zeros((), tl.int32)
    for i_block in range(0, N, BLOCK):
        o_n = i_block + tl.arange(0, BLOCK)
        m_n = o_n < N
        b_kept = (tl.load(p_route + o_n.to(tl.int64) * s_route_n, mask=m_n, other=0.0) > 0.5).to(tl.int32)
        b_before = n_before + tl.cumsum(b_kept, 0) - b_kept
        if VARLEN:
            b_first = tl.load(p_first + o_n, mask=m_n, other=0)
        else:
            b_first = o_n * C
        tl.store(p_count + o_n, b_before, mask=m_n)
        tl.store(p_starts + tl.where(b_kept > 0, b_before, n_kept + o_n - b_before), b_first, mask=m_n)
        n_before += tl.sum(b_kept, 0)
    tl.store(p_count + N, n_kept)


def _block(chunks: int) -> dict[str, int]:
    """Two block sizes only, so that few lengths compile anew."""
    return {"BLOCK": 128, "num_warps": 1} if chunks <= 128 else {"BLOCK": 1024, "num_warps": 4}


def chunk_counts(cu_seqlens: Tensor, size: int) -> Tensor:
    """Number of chunks of ``size`` tokens, a partial one counted, of each packed sequence: [S+1] → [S]."""
    return (cu_seqlens.diff() + (size - 1)) // size


def first_chunks(cu_seqlens: Tensor, chunk_size: int) -> Tensor:
    """Index of the first chunk of each packed sequence and, last, the number of all chunks: [S+1] → int32 [S+1]."""
    counts = chunk_counts(cu_seqlens, chunk_size)
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def packed_blocks(cu_seqlens: Tensor, size: int, count: int) -> tuple[Tensor, Tensor]:
    """Tiles of ``size`` tokens that start anew at every packed sequence, empty sequences having none.

    cu_seqlens [S+1]; ``count``: upper bound of the number of tiles, for example T // size + S. Returns int32 [count]
    each: the sequence of the tile (−1 for the unused tiles at the end) and its first token inside the sequence.
    """
    tiles = chunk_counts(cu_seqlens, size)
    ends = tiles.cumsum(0)
    tile = torch.arange(count, device=cu_seqlens.device, dtype=ends.dtype)
    sequence = torch.searchsorted(ends, tile, right=True)
    used = sequence < tiles.shape[0]
    start = (tile - (ends - tiles)[sequence.clamp(max=tiles.shape[0] - 1)]) * size
    return torch.where(used, sequence, -1).to(torch.int32), torch.where(used, start, 0).to(torch.int32)


def kept_chunks(route: Tensor, cu_seqlens: Tensor | None, chunk_size: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Lists of the chunks that softmax keeps (route > 0.5) and then of the others, per batch element and routing head.

    route [B,N,R]; cu_seqlens [S+1] of sequences that are packed into B = 1, or None. Returns ``starts`` [B,R,N] int32,
    the first tokens (positions in the row of ``tokens``) of the kept chunks in order and, after them, of the others in
    order, and ``count`` [B,R,N+1] int32, the number of kept chunks before chunk n; its last entry is that of all.
    """
    B, N, R = route.shape
    starts = torch.empty(B, R, N, device=route.device, dtype=torch.int32)
    count = torch.empty(B, R, N + 1, device=route.device, dtype=torch.int32)
    first = starts
    if cu_seqlens is not None:
        chunks = chunk_counts(cu_seqlens, chunk_size).sum()
        torch._assert_async((cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens) & (chunks == N))
        sequence, start = packed_blocks(cu_seqlens, chunk_size, N)
        first = (cu_seqlens[sequence.clamp(min=0)] + start).clamp(max=tokens).to(torch.int32)
    if B * R:
        routing_kept_chunks_kernel[(B * R,)](
            route, first, starts, count, N, R, *route.stride(), C=chunk_size, VARLEN=cu_seqlens is not None, **_block(N)
        )
    return starts, count


def _run_capped_routes(margins: Tensor, threshold: Tensor, limits: Tensor, kept: Tensor | None) -> Tensor:
    B, N, R = margins.shape
    route = torch.empty_like(margins, memory_format=torch.contiguous_format)
    if route.numel() == 0:
        return route
    limits = limits.expand(B, N)
    earlier = margins if kept is None else kept.contiguous()
    wide = threshold.to(torch.result_type(margins, threshold)).expand(B, N, R)  # what torch compares in
    routing_capped_routes_kernel[(B * R,)](
        margins, wide, limits, earlier, route, N, R, *margins.stride(), *wide.stride(), *limits.stride(),
        CONTINUED=kept is not None, **_block(N),
    )  # fmt: skip
    return route


_capped_routes = register(
    "capped_routes",
    "(Tensor margins, Tensor threshold, Tensor limits, Tensor? kept) -> Tensor",
    _run_capped_routes,
    lambda margins, *unused: torch.empty_like(margins, memory_format=torch.contiguous_format),
)


def capped_routes(margins: Tensor, threshold: Tensor | float, limits: Tensor, kept: Tensor | None = None) -> Tensor:
    """Threshold and causal token bucket in one kernel: ``limit_routes`` of what ``threshold_routes`` gives.

    margins [B,N,R]; threshold broadcastable to it; limits int32 or int64, broadcastable to [B,N]; kept
    int64 [B,R] or None. Returns float 0/1 [B,N,R] in margins' dtype, without a gradient.
    """
    if not isinstance(threshold, Tensor):
        threshold = margins.new_full((1, 1, 1), threshold)
    route: Tensor = _capped_routes(margins.detach(), threshold.detach(), limits, kept)
    return route
