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
    from natsl.kernels.pages import KeyPages


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
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M slots of one head.

    q, k [B,T,Hs,Ks], v [B,T,Hs,Vs], route [B,N,R] of 0 and 1 (0 for a chunk that does not end), before [B,N,R] int32,
    pages of the head before each chunk, start and count [B] int64, table [B,R,M], keys [P,G,C,Ks], values [P,G,C,Vs],
    open_keys [B,R,G,C,Ks], open_values [B,R,G,C,Vs]. Writes o [B,T,Hs,Vs], contiguous, where there are tokens. What is
    subtracted from a query's logits: as in ``softmax_forward_kernel``.
    """
    i_hs = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    Hs = tl.num_programs(1)
    i_start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the last tiles have the most keys: they go first
    i_first = tl.load(p_start + i_b).to(tl.int32)
    i_length = i_first + tl.load(p_count + i_b).to(tl.int32)
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
    i_total = tl.load(p_before + (i_b * N + i_chunk) * R + i_r) * C
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
@triton.jit(do_not_specialize=["N", "n_places"])
def pages_write_kernel(
    p_k, p_v, p_source, p_page, p_start, p_count, p_keys, p_values,
    N, n_places, R,
    s_k_b, s_k_t, s_k_h, s_v_b, s_v_t, s_v_h,
    G: tl.constexpr, Ks: tl.constexpr, Vs: tl.constexpr, C: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The new tokens of the chunk ``source`` into its ``page``, [B,R,n_places] int64 both: one program per place."""
    i_row = tl.program_id(1)
    i_b = (i_row // R).to(tl.int64)
    i_entry = i_row.to(tl.int64) * n_places + tl.program_id(0)
    i_source = tl.load(p_source + i_entry)
    if i_source >= N:
        return
    o_c = tl.arange(0, C)
    o_token = i_source * C + o_c - tl.load(p_start + i_b)
    m_c = (o_token >= 0) & (o_token < tl.load(p_count + i_b))
    i_page = tl.load(p_page + i_entry)
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
    length: Tensor


@on_own_device
def write(
    k: Tensor, v: Tensor, source: Tensor, page: Tensor, start: Tensor, count: Tensor, pages: KeyPages, chunk_size: int
) -> None:
    """Write what chunks of new tokens k, v [B,T,Hs,·] hold into pages, in place; the rest as in the kernel."""
    B, T, _, Ks = k.shape
    (R, places), G, Vs = source.shape[1:], pages.values.shape[1], pages.values.shape[3]
    constants = shape_constants(k.dtype, Ks, Vs, chunk_size)
    pages_write_kernel[(places, B * R)](
        k, v, source, page, start, count, pages.keys, pages.values,
        (T + chunk_size - 2) // chunk_size + 1, places, R, *k.stride()[:3], *v.stride()[:3],
        G=G, Ks=Ks, Vs=Vs, C=chunk_size, BLOCK_K=constants["BLOCK_K"], BLOCK_V=constants["BLOCK_V"], num_warps=4,
    )  # fmt: skip


@on_own_device
def attend(
    q: Tensor, new: NewTokens, pages: KeyPages, open_keys: Tensor, open_values: Tensor, scale: float, chunk_size: int,
    padded: bool,
) -> Tensor:  # fmt: skip
    """Outputs [B,T,Hs,Vs], 0 where a row has no token, which only ``padded`` ones lack; pages as after the call."""
    B, T, Hs, Ks = q.shape
    (N, R), M, Vs = new.route.shape[1:], pages.table.shape[2], new.v.shape[3]
    make = torch.zeros if padded else torch.empty
    out = make(B, T, Hs, Vs, dtype=q.dtype, device=q.device)
    x = SoftmaxInputs(q, new.k, new.v, new.route)
    blocks = forward_blocks(x, chunk_size)
    tiles = triton.cdiv(N * chunk_size, blocks["BLOCK_M"])
    pages_softmax_kernel[(tiles, Hs, B)](
        q, new.k, new.v, new.route, new.before, new.start, new.length,
        pages.table, pages.keys, pages.values, open_keys, open_values, out,
        scale * LOG2E, T, N, M, R, Hs // R,
        *q.stride()[:3], *new.k.stride()[:3], *new.v.stride()[:3],
        **shape_constants(q.dtype, Ks, Vs, chunk_size), **blocks,
    )  # fmt: skip
    return out
