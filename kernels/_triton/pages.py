# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernels of ``paged_softmax``: tiles of new queries over the pages of a cache, and the writing of these.

Shapes: B batch, T new tokens, C chunk size, N touched chunks, R routing heads, G softmax heads per routing head, Hs =
R·G, P pages, M places of a head in the table, Ks and Vs key and value width of a softmax head.
Names: p_ pointer, s_ stride, i_ index or bound, n_ count, o_ offsets, b_ block in registers, m_ mask.

A query is at a slot: its place counted from the first slot of the row's open chunk, so that tiles are aligned to chunks
wherever the new tokens begin. The pages of complete chunks are written before any query runs. A tile then reads the
pages of its head up to its first chunk as one stream of keys without a mask, and its own chunks from the new tokens, as
``softmax_forward_kernel`` does; only the tokens that the open chunk had before come from a copy of its page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from natsl.kernels._triton.softmax import LOG2E, SoftmaxInputs, forward_blocks, shape_constants
from natsl.kernels._triton.softmax_kernels import LARGEST_SUM, _attend, _load_tile, _own_chunk_mask, _store_tile
from natsl.kernels.launch.launcher import Launcher
from natsl.kernels.launch.library import on_own_device

if TYPE_CHECKING:
    from natsl.kernels.pages import KeyPages, PagePlan


@triton.jit
def _stream_pages(p_list, i_s, i_total, C: tl.constexpr, BLOCK: tl.constexpr):
    """Pages of stream positions i_s … i_s + BLOCK: one if BLOCK ≤ C, else one per position."""
    if BLOCK <= C:
        i_page = tl.load(p_list + i_s // C, mask=i_s < i_total, other=0)
    else:
        o_s = i_s + tl.arange(0, BLOCK)
        i_page = tl.load(p_list + o_s // C, mask=o_s < i_total, other=0)
    return i_page.to(tl.int32)


@triton.jit
def _load_own(
    p_new, p_open, o_s, i_s, i_first, i_length, s_t, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Keys or values of slots i_s … i_s + BLOCK_N: those from ``i_first`` on are new, earlier ones in the open page."""
    o_n = tl.arange(0, BLOCK_N)
    p_tile = p_new + (i_s - i_first).to(tl.int64) * s_t
    b_x = _load_tile(p_tile, o_n, s_t, (o_s >= i_first) & (o_s < i_length), WIDTH, BLOCK, True)
    return b_x + _load_tile(p_open, o_s, WIDTH, o_s < i_first, WIDTH, BLOCK, True)  # one of the two is 0


@triton.jit
def _attend_pages(
    b_q, p_k, p_v, p_open_k, p_open_v, p_page_k, p_page_v, p_list, p_route, i_total, o_t, i_own, i_end, i_first,
    i_length, b_max, R, G, i_j, scale, s_k_t, s_v_t,
    Ks: tl.constexpr, Vs: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FIXED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of P V and of P and what was subtracted: the stream of kept pages, then the tile's own chunks."""
    b_acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    o_n = tl.arange(0, BLOCK_N)
    i_page = _stream_pages(p_list, 0, i_total, C, BLOCK_N)
    for i_s in range(0, i_total, BLOCK_N):
        m_inside = i_s + o_n < i_total
        if BLOCK_N <= C:
            i_base = (i_page.to(tl.int64) * G + i_j) * C + i_s % C
            o_row = o_n
        else:
            i_base = 0
            o_row = (i_page.to(tl.int64) * G + i_j) * C + o_n % C
        # the next step's pages are read a step ahead, so that no load of keys waits for them
        i_page = _stream_pages(p_list, i_s + BLOCK_N, i_total, C, BLOCK_N)
        b_k = _load_tile(p_page_k + i_base * Ks, o_row, Ks, m_inside, Ks, BLOCK_K, BLOCK_N > C)
        b_v = _load_tile(p_page_v + i_base * Vs, o_row, Vs, m_inside, Vs, BLOCK_V, BLOCK_N > C)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_acc, b_max, b_sum = _attend(
            b_s, b_v, b_acc, b_max, b_sum, scale, m_inside[None, :], BLOCK_N > C, FIXED, PRECISION
        )
    for i_s in tl.range(i_own, i_end, BLOCK_N, num_stages=1):  # a few steps, not worth shared memory
        o_s = i_s + o_n
        b_k = _load_own(p_k, p_open_k, o_s, i_s, i_first, i_length, s_k_t, Ks, BLOCK_K, BLOCK_N)
        b_v = _load_own(p_v, p_open_v, o_s, i_s, i_first, i_length, s_v_t, Vs, BLOCK_V, BLOCK_N)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        m_visible = _own_chunk_mask(o_t, i_s, p_route, R, i_length, C, BLOCK_M, BLOCK_N)
        b_acc, b_max, b_sum = _attend(b_s, b_v, b_acc, b_max, b_sum, scale, m_visible, True, FIXED, PRECISION)
    return b_acc, b_max, b_sum


@Launcher
@triton.jit(do_not_specialize=["T", "N", "M"])
def pages_softmax_kernel(
    p_q, p_k, p_v, p_route, p_before, p_start, p_count, p_table, p_keys, p_values, p_open_keys, p_open_values, p_o,
    scale, T, N, M, R, G,
    s_q_b, s_q_t, s_q_h, s_k_b, s_k_t, s_k_h, s_v_b, s_v_t, s_v_h,
    Ks: tl.constexpr, Vs: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M slots of one head.

    q, k [B,T,Hs,Ks], v [B,T,Hs,Vs], route [B,N,R] of 0 and 1 (0 for a chunk that does not end), before [B,N,R] int32,
    pages of the head before each chunk, start and (if PADDED) count [B] int64, table [B,R,M], keys [P,G,C,Ks], values
    [P,G,C,Vs], open_keys [B,R,G,C,Ks], open_values [B,R,G,C,Vs]. Writes o [B,T,Hs,Vs], contiguous, where there are
    tokens. What is subtracted from a query's logits: as in ``softmax_forward_kernel``.
    """
    i_hs = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    Hs = tl.num_programs(1)
    i_start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the last tiles have the most keys: they go first
    i_first = tl.load(p_start + i_b).to(tl.int32)
    i_length = i_first + (tl.load(p_count + i_b).to(tl.int32) if PADDED else T)
    if (i_start >= i_length) | (i_start + BLOCK_M <= i_first):
        return
    i_r = i_hs // G
    i_chunk = i_start // C
    o_m = tl.arange(0, BLOCK_M)
    o_t = i_start + o_m
    m_new = (o_t >= i_first) & (o_t < i_length)
    i_row = (i_start - i_first).to(tl.int64)
    p_k = p_k + i_b * s_k_b + i_hs.to(tl.int64) * s_k_h
    p_v = p_v + i_b * s_v_b + i_hs.to(tl.int64) * s_v_h
    p_q = p_q + i_b * s_q_b + i_hs.to(tl.int64) * s_q_h + i_row * s_q_t
    p_open_keys += (i_b * Hs + i_hs) * C * Ks
    p_open_values += (i_b * Hs + i_hs) * C * Vs
    p_list = p_table + (i_b * R + i_r) * M
    p_route = p_route + i_b * N * R + i_r
    i_total = tl.load(p_before + (i_b * N + i_chunk) * R + i_r).to(tl.int32) * C
    i_own, i_end = i_chunk * C, tl.minimum(i_start + BLOCK_M, i_length)
    b_q = _load_tile(p_q, o_m, s_q_t, m_new, Ks, BLOCK_K, True)

    FIXED: tl.constexpr = p_q.dtype.element_ty != tl.float16
    if FIXED:
        b_key = _load_tile(p_k + i_row * s_k_t, o_m, s_k_t, m_new, Ks, BLOCK_K, True)
        b_max = tl.sum(b_q.to(tl.float32) * b_key.to(tl.float32), 1) * scale
    else:
        b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_acc, b_max, b_sum = _attend_pages(
        b_q, p_k, p_v, p_open_keys, p_open_values, p_keys, p_values, p_list, p_route, i_total, o_t, i_own, i_end,
        i_first, i_length, b_max, R, G, i_hs % G, scale, s_k_t, s_v_t,
        Ks, Vs, BLOCK_K, BLOCK_V, C, BLOCK_M, BLOCK_N, FIXED, PRECISION,
    )  # fmt: skip
    if FIXED:
        m_good = (b_sum < LARGEST_SUM) & (b_sum * LARGEST_SUM > 1.0) & (tl.sum(b_acc * 0.0, 1) == 0.0)
        n_bad = tl.sum(tl.where(m_good | (m_new == 0), 0, 1), 0)
        if n_bad > 0:
            i_zero = tl.minimum(n_bad, 0)  # the compiler may not keep the addresses of the first try in registers
            b_q = _load_tile(p_q + i_zero, o_m, s_q_t, m_new, Ks, BLOCK_K, True)
            b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
            b_acc, b_max, b_sum = _attend_pages(
                b_q, p_k + i_zero, p_v + i_zero, p_open_keys + i_zero, p_open_values + i_zero, p_keys + i_zero,
                p_values + i_zero, p_list + i_zero, p_route + i_zero, i_total, o_t + i_zero, i_own, i_end,
                i_first, i_length, b_max, R, G, i_hs % G, scale, s_k_t, s_v_t,
                Ks, Vs, BLOCK_K, BLOCK_V, C, BLOCK_M, BLOCK_N, False, PRECISION,
            )  # fmt: skip
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)  # slots without a token may have seen nothing
    p_o = p_o + ((i_b * T + i_row) * Hs + i_hs) * Vs
    _store_tile(p_o, o_m, Hs * Vs, m_new, b_acc / b_sum[:, None], Vs, BLOCK_V)


@Launcher
@triton.jit(do_not_specialize=["T", "N"])
def pages_plan_kernel(
    p_route, p_kept, p_start, p_count, p_routed, p_before, p_source, p_after,
    T, N, R, s_b, s_n, s_r,
    C: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """What the chunks of one row and head do to its pages: routes [B,N,R] of any strides, kept and after [B,R].

    Writes routed [B,N,R] float32, before [B,N,R] int32, after, and source [B,R,N + 1] as far as it counts.
    """
    i_row = tl.program_id(0)
    i_b = (i_row // R).to(tl.int64)
    i_r = i_row % R
    i_count = tl.load(p_count + i_b).to(tl.int32) if PADDED else T
    i_open = (tl.load(p_start + i_b).to(tl.int32) + i_count) // C
    n_kept = tl.load(p_kept + i_row)
    p_route += i_b * s_b + i_r * s_r
    p_source += i_row.to(tl.int64) * (N + 1)
    n_new = tl.zeros((), tl.int32)
    for i_n in range(0, N, BLOCK):
        o_n = i_n + tl.arange(0, BLOCK)
        m_kept = (tl.load(p_route + o_n.to(tl.int64) * s_n, mask=o_n < N, other=0.0) > 0.5) & (o_n < i_open)
        b_kept = m_kept.to(tl.int32)
        b_before = n_new + tl.cumsum(b_kept, 0) - b_kept
        o_entry = (i_b * N + o_n) * R + i_r
        tl.store(p_routed + o_entry, b_kept.to(tl.float32), mask=o_n < N)
        tl.store(p_before + o_entry, n_kept.to(tl.int32) + b_before, mask=o_n < N)
        tl.store(p_source + b_before, o_n.to(tl.int64), mask=m_kept)
        n_new += tl.sum(b_kept, 0)
    tl.store(p_source + n_new, i_open.to(tl.int64))  # at most N
    tl.store(p_after + i_row, n_kept + n_new)


@Launcher
@triton.jit(do_not_specialize=["T", "N", "M", "n_pages"])
def pages_write_kernel(
    p_k, p_v, p_source, p_kept, p_after, p_start, p_count, p_table, p_new_table, p_keys, p_values,
    T, N, M, n_pages, R,
    s_k_b, s_k_t, s_k_h, s_v_b, s_v_t, s_v_h,
    G: tl.constexpr, Ks: tl.constexpr, Vs: tl.constexpr, C: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Write the chunk that ``source`` [B,R,N + 1] has for a place, and its page into new_table, a copy of the table.

    One program per place from that of the open chunk on: its page is there, the others take the next free ones.
    """
    i_place = tl.program_id(0)
    i_row = tl.program_id(1)
    i_b = (i_row // R).to(tl.int64)
    n_kept = tl.load(p_kept + i_row)
    if i_place > tl.load(p_after + i_row) - n_kept:
        return
    n_rows = tl.num_programs(1)
    o_entry = i_row.to(tl.int64) * M + n_kept
    i_page = tl.load(p_table + o_entry, mask=n_kept < M, other=0)
    if i_place > 0:
        i_page = (n_rows + i_place).to(tl.int64)  # 1 + B·R + the kept ones of all and the new ones of earlier rows
        for i_other in range(0, n_rows, 128):
            o_row = i_other + tl.arange(0, 128)
            b_kept = tl.load(p_kept + o_row, mask=o_row < n_rows, other=0)
            b_after = tl.load(p_after + o_row, mask=o_row < n_rows, other=0)
            i_page += tl.sum(tl.where(o_row < i_row, b_after, b_kept), 0)
    m_there = (n_kept + i_place < M) & (i_page < n_pages)  # the caller sees to it
    tl.store(p_new_table + o_entry + i_place, i_page, mask=m_there)
    i_source = tl.load(p_source + i_row.to(tl.int64) * (N + 1) + i_place)
    o_c = tl.arange(0, C)
    o_token = i_source * C + o_c - tl.load(p_start + i_b)
    i_count = tl.load(p_count + i_b).to(tl.int32) if PADDED else T
    m_c = (o_token >= 0) & (o_token < tl.where(m_there, i_count, 0))
    for j in tl.static_range(G):
        i_hs = ((i_row % R) * G + j).to(tl.int64)
        o_slot = (i_page * G + j) * C + o_c
        b_k = _load_tile(p_k + i_b * s_k_b + i_hs * s_k_h, o_token, s_k_t, m_c, Ks, BLOCK_K, True)
        _store_tile(p_keys, o_slot, Ks, m_c, b_k, Ks, BLOCK_K)
        b_v = _load_tile(p_v + i_b * s_v_b + i_hs * s_v_h, o_token, s_v_t, m_c, Vs, BLOCK_V, True)
        _store_tile(p_values, o_slot, Vs, m_c, b_v, Vs, BLOCK_V)


class NewTokens(NamedTuple):
    """New tokens and where they are, as ``pages_softmax_kernel`` explains them; k, v of any strides but the last."""

    k: Tensor
    v: Tensor
    route: Tensor
    before: Tensor
    start: Tensor
    length: Tensor | None  # all where there is none


@on_own_device
def plan(
    route: Tensor, kept: Tensor, start: Tensor, tokens: int, chunk_size: int, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of a ``PagePlan``; arguments as in ``plan_pages``, contiguous but for the routes."""
    B, N, R = route.shape
    routed = torch.empty(B, N, R, dtype=torch.float32, device=route.device)
    before = torch.empty(B, N, R, dtype=torch.int32, device=route.device)
    source = torch.empty(B, R, N + 1, dtype=torch.int64, device=route.device)
    after = torch.empty_like(kept)
    pages_plan_kernel[(B * R,)](
        route, kept, start, start if lengths is None else lengths.contiguous(), routed, before, source, after,
        tokens, N, R, *route.stride(),
        C=chunk_size, BLOCK=128 if N <= 128 else 1024, PADDED=lengths is not None, num_warps=4,
    )  # fmt: skip
    return routed, before, source, after


@on_own_device
def write(
    k: Tensor, v: Tensor, plan: PagePlan, start: Tensor, count: Tensor | None, pages: KeyPages, chunk_size: int
) -> KeyPages:
    """Write what chunks of new tokens k, v [B,T,Hs,·] hold into pages, in place; the pages with their new table."""
    B, T, _, Ks = k.shape
    (R, M), (P, G, _, Vs), N = pages.table.shape[1:], pages.values.shape, plan.routed.shape[1]
    constants = shape_constants(k.dtype, Ks, Vs, chunk_size)
    old, table = pages.table.contiguous(), pages.table.clone(memory_format=torch.contiguous_format)
    pages_write_kernel[(N + 1, B * R)](
        k, v, plan.source, pages.kept.contiguous(), plan.kept, start, start if count is None else count, old, table,
        pages.keys, pages.values,
        T, N, M, P, R, *k.stride()[:3], *v.stride()[:3],
        G=G, Ks=Ks, Vs=Vs, C=chunk_size, BLOCK_K=constants["BLOCK_K"], BLOCK_V=constants["BLOCK_V"],
        PADDED=count is not None, num_warps=4,
    )  # fmt: skip
    return pages._replace(table=table, kept=plan.kept)


@on_own_device
def attend(
    q: Tensor, new: NewTokens, pages: KeyPages, open_keys: Tensor, open_values: Tensor, scale: float, chunk_size: int
) -> Tensor:
    """Outputs [B,T,Hs,Vs], 0 where a row has no token; pages as after the call."""
    B, T, Hs, Ks = q.shape
    (N, R), M, Vs = new.route.shape[1:], pages.table.shape[2], new.v.shape[3]
    make = torch.empty if new.length is None else torch.zeros
    out = make(B, T, Hs, Vs, dtype=q.dtype, device=q.device)
    x = SoftmaxInputs(q, new.k, new.v, new.route)
    blocks = forward_blocks(x, chunk_size)
    tiles = triton.cdiv(N * chunk_size, blocks["BLOCK_M"])
    pages_softmax_kernel[(tiles, Hs, B)](
        q, new.k, new.v, new.route, new.before, new.start, new.start if new.length is None else new.length,
        pages.table, pages.keys, pages.values, open_keys, open_values, out,
        scale * LOG2E, T, N, M, R, Hs // R,
        *q.stride()[:3], *new.k.stride()[:3], *new.v.stride()[:3],
        **shape_constants(q.dtype, Ks, Vs, chunk_size), PADDED=new.length is not None, **blocks,
    )  # fmt: skip
    return out
