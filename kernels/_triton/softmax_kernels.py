# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernels of ``routed_softmax``: attention over the own chunk and a list of kept chunks, forward and backward.

Shapes: B batch, T tokens, C chunk size, N chunks, R routing heads, Hs key heads, Hq query heads, J = Hq/Hs query heads
per key head, G = Hs/R key heads per routing head, Ks key width, Vs value width. A chunk is kept where its route is 1.
``starts`` [B,R,N] int32 is the first token of every kept chunk in order and then of the others, ``count`` [B,R,N+1]
int32 the number kept before each chunk. ``lse`` [B,Hq,≥T] float32 is log2 of the sum of exp(scale·q·k) over the
visible keys: log base 2, so that P = exp2(scale·log2(e)·q·k − lse). ``delta`` [B,Hq,≥T] float32 is δ = Σ dO·O of each
query. ``da`` is a key head's share in the gradient of the routes.
Names: p_ pointer, s_ stride, i_ index or bound, n_ count, o_ offsets, b_ block in registers, m_ mask.

The keys of earlier chunks are read as one stream: position p of it is in kept chunk p // C. All of its chunks are
complete and visible to every query of a tile, so the long loops have no mask. Nothing here waits for the device, and no
sum depends on the order in which programs run. Source: arXiv 2602.03681, section 3; gradients in docs/method.md.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from natsl.kernels.launch.launcher import Launcher

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # has no inline assembly
LARGEST_SUM = tl.constexpr(2.0**64)


@triton.jit
def _load_tile(
    p_tile, o_row, s_row, m_valid, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHECK: tl.constexpr,
    CONSTANT: tl.constexpr = False,
):  # fmt: skip
    """Rows ``o_row`` of a matrix with unit column stride; zeros past WIDTH and, if CHECK, where not ``m_valid``.

    CONSTANT: ``s_row`` is a compile-time constant.
    """
    o_column = tl.arange(0, BLOCK)
    if CONSTANT:  # a thread of four warps has rows that are ROWS apart, at a distance that takes no register
        LOADED: tl.constexpr = 128 * 128 // p_tile.dtype.element_ty.primitive_bitwidth
        ROWS: tl.constexpr = LOADED // BLOCK if LOADED > BLOCK else 1
        p_element = p_tile + (o_row & (ROWS - 1))[:, None] * s_row + o_column[None, :]
        p_element += (o_row & -ROWS)[:, None] * s_row
    else:
        p_element = p_tile + o_row[:, None] * s_row + o_column[None, :]
    if WIDTH < BLOCK:
        m_inside = (o_column < WIDTH)[None, :]
        if CHECK:
            m_inside = m_inside & m_valid[:, None]
        b_tile = tl.load(p_element, mask=m_inside, other=0.0)
    elif CHECK:
        b_tile = tl.load(p_element, mask=m_valid[:, None], other=0.0)
    else:
        b_tile = tl.load(p_element)
    return b_tile


@triton.jit
def _store_tile(p_tile, o_row, s_row, m_valid, b_tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store ``b_tile`` [rows, BLOCK] into the valid rows and the first WIDTH columns."""
    o_column = tl.arange(0, BLOCK)
    m_tile = m_valid[:, None] & (o_column < WIDTH)[None, :]
    p_element = p_tile + o_row[:, None] * s_row + o_column[None, :]
    tl.store(p_element, b_tile.to(p_tile.dtype.element_ty), mask=m_tile)


@triton.jit
def _stat_stride(T):
    """Length of a head's row of ``lse`` and ``delta``: a multiple of 16, which aligns loads of several numbers."""
    return (T + 15) // 16 * 16


@triton.jit
def _tile_position(
    i_tile, T, p_cu_seqlens, p_first_chunk, p_sequence, p_tile_start, BLOCK: tl.constexpr, VARLEN: tl.constexpr
):
    """First token, length and first chunk of the sequence of tile ``i_tile``, and the tile's start inside it."""
    if VARLEN:
        i_sequence = tl.load(p_sequence + i_tile)
        m_used = i_sequence >= 0
        i_begin = tl.load(p_cu_seqlens + i_sequence, mask=m_used, other=0)
        i_length = tl.load(p_cu_seqlens + i_sequence + 1, mask=m_used, other=0) - i_begin
        i_first = tl.load(p_first_chunk + i_sequence, mask=m_used, other=0)
        i_start = tl.load(p_tile_start + i_tile, mask=m_used, other=0)
    else:
        i_begin = i_tile * 0
        i_length = T
        i_first = i_tile * 0
        i_start = i_tile * BLOCK
    return i_begin.to(tl.int64), i_length, i_first, i_start


@triton.jit
def _kept_before(p_starts, p_count, i_list, N, i_first, i_chunk, C: tl.constexpr):
    """The list of a sequence's kept chunks and how many of its positions are before chunk ``i_chunk`` of it.

    ``i_list``: batch element and routing head; ``i_first``: the sequence's first chunk.
    """
    p_count = p_count + i_list * (N + 1) + i_first
    n_entry = tl.load(p_count)
    return p_starts + i_list * N + n_entry, (tl.load(p_count + i_chunk) - n_entry) * C


@triton.jit
def _stream_tokens(p_list, i_s, i_total, C: tl.constexpr, BLOCK: tl.constexpr):
    """First tokens of the chunks at stream positions i_s … i_s + BLOCK: one if BLOCK ≤ C, else one per position."""
    if BLOCK <= C:
        i_token = tl.load(p_list + i_s // C, mask=i_s < i_total, other=0)
    else:
        o_s = i_s + tl.arange(0, BLOCK)
        i_token = tl.load(p_list + o_s // C, mask=o_s < i_total, other=0)
    return i_token


@triton.jit
def _stream_place(i_token, i_s, C: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of stream positions i_s … i_s + BLOCK, from ``_stream_tokens``: a 64-bit number and rows relative to it."""
    o_row = tl.arange(0, BLOCK)
    if BLOCK <= C:
        i_base = (i_token + i_s % C).to(tl.int64)
    else:
        i_base = 0
        o_row = (i_token + o_row % C).to(tl.int64)
    return i_base, o_row


@triton.jit
def _stream_rows(p_list, i_start, i_total, T, C: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens of stream positions i_start … i_start + BLOCK; T past its end."""
    o_s = i_start + tl.arange(0, BLOCK)
    m_inside = o_s < i_total
    return tl.where(m_inside, tl.load(p_list + o_s // C, mask=m_inside, other=0) + o_s % C, T)


@triton.jit
def _own_chunk_mask(o_t, i_s, p_route, R, i_length, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which keys i_s … i_s + BLOCK_N of the tile's own chunks the queries ``o_t`` see; ``p_route``: of chunk 0."""
    o_s = i_s + tl.arange(0, BLOCK_N)
    m_visible = o_s[None, :] <= o_t[:, None]
    if BLOCK_M > C:  # else all keys are in the one chunk of the tile
        if BLOCK_N <= C:
            m_kept = tl.load(p_route + i_s // C * R) > 0.5
            m_visible = m_visible & (o_t < tl.where(m_kept, i_length, (i_s // C + 1) * C))[:, None]
        else:
            m_kept = tl.load(p_route + o_s // C * R, mask=o_s < i_length, other=0.0) > 0.5
            m_visible = m_visible & (m_kept[None, :] | ((o_s // C)[None, :] == (o_t // C)[:, None]))
    return m_visible


@triton.jit
def _round(b_x, dtype: tl.constexpr):
    """float32 x in ``dtype`` and the same values in float32."""
    if dtype == tl.bfloat16 and not INTERPRETED:  # two at a time: the compiler would convert one by one
        b_short, b_long = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $4, $3; shl.b32 $1, $0, 16; and.b32 $2, $0, 0xffff0000;",
            "=&r,=&r,=&r,r,r", [b_x], (tl.bfloat16, tl.float32), True, 2,
        )  # fmt: skip
    else:
        b_short = b_x.to(dtype)
        b_long = b_short.to(tl.float32)
    return b_short, b_long


@triton.jit
def _attend(
    b_s, b_v, b_acc, b_max, b_sum, scale, m_visible,
    MASKED: tl.constexpr, FIXED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the softmax, in base 2; scale > 0. FIXED: ``b_max`` is subtracted as it is, else as it grows."""
    if FIXED:
        b_p = tl.exp2(b_s * scale - b_max[:, None])
        if MASKED:
            b_p = tl.where(m_visible, b_p, 0.0)
        b_rounded, b_p = _round(b_p, b_v.dtype)
        b_sum += tl.sum(b_p, 1)
        b_acc = tl.dot(b_rounded, b_v, b_acc, input_precision=PRECISION)
    else:
        if MASKED:
            b_s = tl.where(m_visible, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
        if MASKED:  # a row may have seen nothing yet
            b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        else:
            b_shift = b_new
        b_p = tl.exp2(b_s * scale - b_shift[:, None])
        b_keep = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_keep + tl.sum(b_p, 1)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_keep[:, None], input_precision=PRECISION)
        b_max = b_new
    return b_acc, b_max, b_sum


@triton.jit
def _attend_all(
    b_q, p_k, p_v, p_route, p_list, i_total, o_t, i_begin, i_own, i_end, i_length, b_max, R, scale, s_k_t, s_v_t,
    Ks: tl.constexpr, Vs: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FIXED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of P V and of P and what was subtracted: the stream of kept earlier chunks, then the tile's own ones."""
    b_acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    o_n = tl.arange(0, BLOCK_N)
    i_token = _stream_tokens(p_list, 0, i_total, C, BLOCK_N)
    for i_s in range(0, i_total, BLOCK_N):
        i_base, o_row = _stream_place(i_token, i_s, C, BLOCK_N)
        m_inside = i_s + o_n < i_total
        # the next step's tokens are read a step ahead, so that no load of keys waits for them
        i_token = _stream_tokens(p_list, i_s + BLOCK_N, i_total, C, BLOCK_N)
        b_k = _load_tile(p_k + i_base * s_k_t, o_row, s_k_t, m_inside, Ks, BLOCK_K, BLOCK_N > C)
        b_v = _load_tile(p_v + i_base * s_v_t, o_row, s_v_t, m_inside, Vs, BLOCK_V, BLOCK_N > C)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_acc, b_max, b_sum = _attend(
            b_s, b_v, b_acc, b_max, b_sum, scale, m_inside[None, :], BLOCK_N > C, FIXED, PRECISION
        )
    for i_s in range(i_own, i_end, BLOCK_N):
        o_s = i_s + o_n
        i_base = i_begin + i_s  # 64 bits
        b_k = _load_tile(p_k + i_base * s_k_t, o_n, s_k_t, o_s < i_length, Ks, BLOCK_K, True)
        b_v = _load_tile(p_v + i_base * s_v_t, o_n, s_v_t, o_s < i_length, Vs, BLOCK_V, True)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        m_visible = _own_chunk_mask(o_t, i_s, p_route, R, i_length, C, BLOCK_M, BLOCK_N)
        b_acc, b_max, b_sum = _attend(b_s, b_v, b_acc, b_max, b_sum, scale, m_visible, True, FIXED, PRECISION)
    return b_acc, b_max, b_sum


@Launcher
@triton.jit(do_not_specialize=["T", "N"])
def softmax_forward_kernel(
    p_q, p_k, p_v, p_route, p_starts, p_count, p_o, p_lse,
    p_cu_seqlens, p_first_chunk, p_sequence, p_tile_start,
    scale, T, N, R, J, G,
    s_q_b, s_q_t, s_q_h, s_k_b, s_k_t, s_k_h, s_v_b, s_v_t, s_v_h,
    Ks: tl.constexpr, Vs: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M queries of one head.

    What is subtracted from a query's logits is the logit of its own key, not the largest one: P is then a number whose
    sum is at least one, with nearly the same relative error. That saves a quarter of the instructions of each step.
    Where a sum comes out so large that P may have been infinite, or a product with a value was, the tile starts again
    with the running maximum, as always in float16. (A shift known beforehand with a second try: arXiv 2311.01282,
    section 3.)
    """
    i_hq = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    Hq = tl.num_programs(1)
    # the last tiles of a sequence have the most keys: they go first
    i_tile = tl.program_id(0) if VARLEN else tl.num_programs(0) - 1 - tl.program_id(0)
    i_begin, i_length, i_first, i_start = _tile_position(
        i_tile, T, p_cu_seqlens, p_first_chunk, p_sequence, p_tile_start, BLOCK_M, VARLEN
    )
    if i_start >= i_length:
        return
    i_hs = (i_hq // J).to(tl.int64)
    i_r = i_hs // G
    i_row = i_begin + i_start
    i_chunk = i_start // C
    o_m = tl.arange(0, BLOCK_M)
    o_t = i_start + o_m
    p_k = p_k + i_b * s_k_b + i_hs * s_k_h
    p_v = p_v + i_b * s_v_b + i_hs * s_v_h
    p_q = p_q + i_b * s_q_b + i_hq.to(tl.int64) * s_q_h + i_row * s_q_t
    b_q = _load_tile(p_q, o_m, s_q_t, o_t < i_length, Ks, BLOCK_K, True)
    p_list, i_total = _kept_before(p_starts, p_count, i_b * R + i_r, N, i_first, i_chunk, C)
    p_route = p_route + (i_b * N + i_first) * R + i_r
    i_own, i_end = i_chunk * C, tl.minimum(i_start + BLOCK_M, i_length)

    FIXED: tl.constexpr = p_q.dtype.element_ty != tl.float16
    if FIXED:
        b_key = _load_tile(p_k + i_row * s_k_t, o_m, s_k_t, o_t < i_length, Ks, BLOCK_K, True)
        b_max = tl.sum(b_q.to(tl.float32) * b_key.to(tl.float32), 1) * scale
    else:
        b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_acc, b_max, b_sum = _attend_all(
        b_q, p_k, p_v, p_route, p_list, i_total, o_t, i_begin, i_own, i_end, i_length, b_max, R, scale, s_k_t, s_v_t,
        Ks, Vs, BLOCK_K, BLOCK_V, C, BLOCK_M, BLOCK_N, FIXED, PRECISION,
    )  # fmt: skip
    if FIXED:
        m_good = (b_sum < LARGEST_SUM) & (b_sum * LARGEST_SUM > 1.0) & (tl.sum(b_acc * 0.0, 1) == 0.0)
        n_bad = tl.sum(tl.where(m_good | (o_t >= i_length), 0, 1), 0)
        if n_bad > 0:
            i_zero = tl.minimum(n_bad, 0)  # the compiler may not keep the addresses of the first try in registers
            b_q = _load_tile(p_q + i_zero, o_m, s_q_t, o_t < i_length, Ks, BLOCK_K, True)
            b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
            b_acc, b_max, b_sum = _attend_all(
                b_q, p_k + i_zero, p_v + i_zero, p_route + i_zero, p_list + i_zero, i_total, o_t + i_zero, i_begin,
                i_own, i_end, i_length, b_max, R, scale, s_k_t, s_v_t,
                Ks, Vs, BLOCK_K, BLOCK_V, C, BLOCK_M, BLOCK_N, False, PRECISION,
            )  # fmt: skip

    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)  # rows past the end may have seen nothing
    p_o = p_o + ((i_b * T + i_row) * Hq + i_hq) * Vs
    _store_tile(p_o, o_m, Hq * Vs, o_t < i_length, b_acc / b_sum[:, None], Vs, BLOCK_V)
    i_written = i_length if VARLEN else _stat_stride(T)  # the row's end is nobody's, but not unwritten
    tl.store(p_lse + (i_b * Hq + i_hq) * _stat_stride(T) + i_row + o_m, b_max + tl.log2(b_sum), mask=o_t < i_written)


@triton.jit
def _add_dq(b_q, b_k, b_v, b_do, b_lse, b_delta, b_dq, scale, m_visible, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """dq += dS K with dS = P(dP − δ)."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    b_p = tl.exp2(b_s * scale - b_lse[:, None])
    if MASKED:
        b_p = tl.where(m_visible, b_p, 0.0)
    b_ds = b_p * (b_dp - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@Launcher
@triton.jit(do_not_specialize=["T", "N"])
def softmax_dq_kernel(
    p_q, p_k, p_v, p_do, p_o, p_lse, p_route, p_starts, p_count, p_dq, p_delta,
    p_cu_seqlens, p_first_chunk, p_sequence, p_tile_start,
    scale, scale_out, T, N, R, J, G,
    s_q_b, s_q_t, s_q_h, s_k_b, s_k_t, s_k_h, s_v_b, s_v_t, s_v_h, s_do_b, s_do_t, s_do_h,
    Ks: tl.constexpr, Vs: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """δ = Σ dO·O and dq of one tile of queries of one head; tiled as the forward."""
    i_hq = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    Hq = tl.num_programs(1)
    i_tile = tl.program_id(0) if VARLEN else tl.num_programs(0) - 1 - tl.program_id(0)
    i_begin, i_length, i_first, i_start = _tile_position(
        i_tile, T, p_cu_seqlens, p_first_chunk, p_sequence, p_tile_start, BLOCK_M, VARLEN
    )
    if i_start >= i_length:
        return
    i_hs = (i_hq // J).to(tl.int64)
    i_r = i_hs // G
    i_row = i_begin + i_start
    i_chunk = i_start // C
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_t = i_start + o_m
    p_k = p_k + i_b * s_k_b + i_hs * s_k_h
    p_v = p_v + i_b * s_v_b + i_hs * s_v_h
    p_q = p_q + i_b * s_q_b + i_hq.to(tl.int64) * s_q_h + i_row * s_q_t
    p_do = p_do + i_b * s_do_b + i_hq.to(tl.int64) * s_do_h + i_row * s_do_t
    p_o = p_o + ((i_b * T + i_row) * Hq + i_hq) * Vs
    i_stat = (i_b * Hq + i_hq) * _stat_stride(T) + i_row
    b_do = _load_tile(p_do, o_m, s_do_t, o_t < i_length, Vs, BLOCK_V, True)
    b_o = _load_tile(p_o, o_m, Hq * Vs, o_t < i_length, Vs, BLOCK_V, True)
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    tl.store(p_delta + i_stat + o_m, b_delta, mask=o_t < i_length)
    b_q = _load_tile(p_q, o_m, s_q_t, o_t < i_length, Ks, BLOCK_K, True)
    b_lse = tl.load(p_lse + i_stat + o_m, mask=o_t < i_length, other=0.0)

    b_dq = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    p_list, i_total = _kept_before(p_starts, p_count, i_b * R + i_r, N, i_first, i_chunk, C)
    i_token = _stream_tokens(p_list, 0, i_total, C, BLOCK_N)
    for i_s in range(0, i_total, BLOCK_N):
        i_base, o_row = _stream_place(i_token, i_s, C, BLOCK_N)
        m_inside = i_s + o_n < i_total
        i_token = _stream_tokens(p_list, i_s + BLOCK_N, i_total, C, BLOCK_N)
        b_k = _load_tile(p_k + i_base * s_k_t, o_row, s_k_t, m_inside, Ks, BLOCK_K, BLOCK_N > C)
        b_v = _load_tile(p_v + i_base * s_v_t, o_row, s_v_t, m_inside, Vs, BLOCK_V, BLOCK_N > C)
        b_dq = _add_dq(b_q, b_k, b_v, b_do, b_lse, b_delta, b_dq, scale, m_inside[None, :], BLOCK_N > C, PRECISION)

    p_route = p_route + (i_b * N + i_first) * R + i_r
    for i_s in range(i_chunk * C, tl.minimum(i_start + BLOCK_M, i_length), BLOCK_N):
        o_s = i_s + o_n
        i_base = i_begin + i_s  # 64 bits
        b_k = _load_tile(p_k + i_base * s_k_t, o_n, s_k_t, o_s < i_length, Ks, BLOCK_K, True)
        b_v = _load_tile(p_v + i_base * s_v_t, o_n, s_v_t, o_s < i_length, Vs, BLOCK_V, True)
        m_visible = _own_chunk_mask(o_t, i_s, p_route, R, i_length, C, BLOCK_M, BLOCK_N)
        b_dq = _add_dq(b_q, b_k, b_v, b_do, b_lse, b_delta, b_dq, scale, m_visible, True, PRECISION)

    p_dq = p_dq + ((i_b * T + i_row) * Hq + i_hq) * Ks
    _store_tile(p_dq, o_m, Hq * Ks, o_t < i_length, b_dq * scale_out, Ks, BLOCK_K)


@triton.jit
def _add_dkv(
    b_q, b_k, b_v, b_do, p_lse, p_delta, m_inside, b_dk, b_dv, scale, m_visible, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk += dSᵀ Q and dv += Pᵀ dO, with Sᵀ = K Qᵀ computed directly; also dSᵀ."""
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
    if MASKED:  # queries past the end: dO, dP and δ are 0, and so is what they add
        b_lse = tl.load(p_lse, mask=m_inside, other=0.0)
        b_p = tl.where(m_visible, tl.exp2(b_s * scale - b_lse[None, :]), 0.0)
    else:
        b_p = tl.exp2(b_s * scale - tl.load(p_lse)[None, :])
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
    if MASKED:
        b_ds = b_p * (b_dp - tl.load(p_delta, mask=m_inside, other=0.0)[None, :])
    else:
        b_ds = b_p * (b_dp - tl.load(p_delta)[None, :])
    return tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION), b_dv, b_ds


@Launcher
@triton.jit(do_not_specialize=["T", "N"])
def softmax_dkv_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_route, p_starts, p_count, p_dk, p_dv, p_da,
    p_cu_seqlens, p_first_chunk, p_sequence, p_tile_start,
    scale, scale_out, T, N, R, J, G,
    s_q_b, s_q_t: tl.constexpr, s_q_h, s_k_b, s_k_t, s_k_h, s_v_b, s_v_t, s_v_h, s_do_b, s_do_t: tl.constexpr, s_do_h,
    Ks: tl.constexpr, Vs: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, VARLEN: tl.constexpr,
    WANT_ROUTE: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """dk, dv (with ADD added to what is there) and dL/da of one tile of keys of one head.

    A tile is taken from the stream of kept chunks, which later queries see, or from that of the rest, of which only
    the own chunks do. Packed: a tile is a part of one chunk.
    """
    i_hs = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    Hs = tl.num_programs(1)
    i_r = i_hs // G
    i_tile = tl.program_id(0)
    i_begin, i_length, i_first, i_start = _tile_position(
        i_tile, T, p_cu_seqlens, p_first_chunk, p_sequence, p_tile_start, BLOCK_N, VARLEN
    )
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    PARTS: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    # o_s: token inside the sequence of every key. Queries come in steps: those of a kept tile from its first key to the
    # end of the sequence, those of another from its first key to the end of the last key's chunk, taken from the same
    # stream as the keys. The first ``n_masked`` steps and a last one that is not full need the mask and go first; i_end
    # ends the queries of a step.
    if VARLEN:
        i_total = i_length
        m_used = i_start < i_length
        m_kept = tl.load(p_route + (i_b * N + i_first + i_start // C) * R + i_r, mask=m_used, other=0.0) > 0.5
        o_s = i_start + o_n
        m_valid = o_s < i_length
        i_low = i_start
        i_high = tl.minimum((i_start // C + 1) * C, i_length)
        p_list = p_starts
    else:
        n_kept = tl.load(p_count + (i_b * R + i_r) * (N + 1) + N)
        n_kept_tiles = (n_kept * C + BLOCK_N - 1) // BLOCK_N
        m_kept = i_tile < n_kept_tiles
        if m_kept:
            p_list = p_starts + (i_b * R + i_r) * N
            i_total = n_kept * C
            i_start = i_tile * BLOCK_N
        else:
            p_list = p_starts + (i_b * R + i_r) * N + n_kept
            i_total = (N - n_kept) * C
            i_start = (i_tile - n_kept_tiles) * BLOCK_N
        o_s = _stream_rows(p_list, i_start, i_total, T, C, BLOCK_N)
        m_valid = o_s < T
        i_last = tl.minimum(i_start + BLOCK_N, i_total) - 1
        m_used = i_start < i_total
        i_low = tl.load(p_list + i_start // C, mask=m_used, other=0) + i_start % C
        i_high = tl.minimum(tl.load(p_list + i_last // C, mask=m_used, other=0) + C, T)
    if i_start >= i_total:
        return
    o_row = i_begin + o_s
    b_k = _load_tile(p_k + i_b * s_k_b + i_hs * s_k_h, o_row, s_k_t, m_valid, Ks, BLOCK_K, True)
    b_v = _load_tile(p_v + i_b * s_v_b + i_hs * s_v_h, o_row, s_v_t, m_valid, Vs, BLOCK_V, True)
    o_next = (o_s // C + 1) * C  # the first query of a later chunk
    o_bound = tl.where(m_kept, i_length, o_next)  # the first query that does not see the key
    n_masked = (i_high - i_low + BLOCK_M - 1) // BLOCK_M
    if BLOCK_N > C:
        n_masked = tl.where(m_kept, n_masked, (BLOCK_N + BLOCK_M - 1) // BLOCK_M)
        i_end = i_length
        i_stream = tl.where(m_kept, 0, i_total)
    else:
        i_end = tl.where(m_kept, i_length, i_high)
        i_stream = 0
    n_steps = tl.where(m_kept, (i_length - i_low + BLOCK_M - 1) // BLOCK_M, n_masked)
    n_rest = ((n_steps > n_masked) & ((i_length - i_low) % BLOCK_M > 0)).to(tl.int32)  # a last step that is not full

    b_dk = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    b_da = tl.zeros([BLOCK_N], tl.float32)
    for i_j in range(J):
        i_hq = i_hs * J + i_j
        p_q_head = p_q + i_b * s_q_b + i_hq * s_q_h
        p_do_head = p_do + i_b * s_do_b + i_hq * s_do_h
        i_stat = (i_b * Hs * J + i_hq) * _stat_stride(T) + i_begin
        if BLOCK_N > C:
            i_token = _stream_tokens(p_list, i_start, i_stream, C, BLOCK_M)
        for i_turn in range(n_masked + n_rest):
            i_step = tl.where(i_turn < n_masked, i_turn, n_steps - 1)
            i_query = i_low + i_step * BLOCK_M
            if BLOCK_N > C:
                i_place = i_start + i_step * BLOCK_M
                if BLOCK_M <= C:
                    i_own = tl.where(i_place < i_stream, i_token + i_place % C, (T // 16 + 1) * 16)
                    i_query = tl.multiple_of(tl.where(m_kept, i_query, i_own), 16)
                    o_t = i_query + o_m
                else:
                    o_own = tl.where(i_place + o_m < i_stream, i_token + (i_place + o_m) % C, T)
                    o_t = tl.where(m_kept, i_query + o_m, o_own)
                i_token = _stream_tokens(p_list, i_place + BLOCK_M, i_stream, C, BLOCK_M)
            else:
                i_query = tl.multiple_of(i_query, 16)
                o_t = i_query + o_m
            m_inside = o_t < i_end
            # queries relative to a number: carried along, they would cost a register each
            if BLOCK_M > C and BLOCK_N > C:
                i_shift = 0
                o_query = o_t.to(tl.int64)
            else:
                i_shift = i_query
                o_query = o_m
            i_base = i_begin + i_shift  # 64 bits
            b_q = _load_tile(p_q_head + i_base * s_q_t, o_query, s_q_t, m_inside, Ks, BLOCK_K, True, True)
            b_do = _load_tile(p_do_head + i_base * s_do_t, o_query, s_do_t, m_inside, Vs, BLOCK_V, True, True)
            m_visible = (o_s - i_shift)[:, None] <= o_query[None, :]
            m_visible = m_visible & (o_query[None, :] < (o_bound - i_shift)[:, None])
            o_stat = i_stat + o_t
            b_dk, b_dv, b_ds = _add_dkv(
                b_q, b_k, b_v, b_do, p_lse + o_stat, p_delta + o_stat, m_inside, b_dk, b_dv, scale, m_visible, True,
                PRECISION,
            )  # fmt: skip
            if WANT_ROUTE:
                b_da += tl.sum(tl.where(o_query[None, :] >= (o_next - i_shift)[:, None], b_ds, 0.0), 1)
        for i_step in range(n_masked, n_steps - n_rest):
            i_query = tl.multiple_of(i_low + i_step * BLOCK_M, 16)
            i_base = i_begin + i_query  # 64 bits
            b_q = _load_tile(p_q_head + i_base * s_q_t, o_m, s_q_t, o_m, Ks, BLOCK_K, False, True)
            b_do = _load_tile(p_do_head + i_base * s_do_t, o_m, s_do_t, o_m, Vs, BLOCK_V, False, True)
            o_stat = i_stat + i_query + o_m
            b_dk, b_dv, b_ds = _add_dkv(
                b_q, b_k, b_v, b_do, p_lse + o_stat, p_delta + o_stat, o_m, b_dk, b_dv, scale, o_m, False, PRECISION
            )
            if WANT_ROUTE:
                b_da += tl.sum(b_ds, 1)

    if not VARLEN:  # read again: kept in registers, they would displace the sums
        o_s = _stream_rows(p_list, i_start, i_total, T, C, BLOCK_N)
    o_row = i_begin + o_s
    m_valid = o_s < i_length
    i_out = i_b * T * Hs + i_hs
    _store_tile(p_dk + i_out * Ks, o_row, Hs * Ks, m_valid, b_dk * scale_out, Ks, BLOCK_K)
    p_dv = p_dv + i_out * Vs
    if ADD:
        b_dv += _load_tile(p_dv, o_row, Hs * Vs, m_valid, Vs, BLOCK_V, True).to(tl.float32)
    _store_tile(p_dv, o_row, Hs * Vs, m_valid, b_dv, Vs, BLOCK_V)
    if WANT_ROUTE:
        b_da = tl.where(m_valid, b_da, 0.0)
        if BLOCK_N > C:
            o_chunk = tl.arange(0, BLOCK_N // C)
            o_place = i_start // C + o_chunk
            i_chunk = tl.load(p_list + o_place, mask=o_place < i_total // C, other=0) // C
            b_sum = tl.sum(tl.reshape(b_da, [BLOCK_N // C, C]), 1)
            b_sum = tl.where(m_kept, b_sum, 0.0)
            tl.store(p_da + (i_b * N + i_chunk) * Hs + i_hs, b_sum, mask=o_place < i_total // C)
        else:
            i_place = (i_b * N + i_first + i_low // C) * Hs + i_hs
            tl.store(p_da + i_place * PARTS + i_low % C // BLOCK_N, tl.where(m_kept, tl.sum(b_da, 0), 0.0))


@Launcher
@triton.jit(do_not_specialize=["T", "N"])
def softmax_counterfactual_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_sampled, p_starts, p_count, p_da,
    p_cu_seqlens, p_first_chunk, p_sequence, p_tile_start,
    scale, T, N, R, J, G,
    s_q_b, s_q_t: tl.constexpr, s_q_h, s_k_b, s_k_t, s_k_h, s_v_b, s_v_t, s_v_h, s_do_b, s_do_t: tl.constexpr, s_do_h,
    Ks: tl.constexpr, Vs: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, VARLEN: tl.constexpr,
    PARTS: tl.constexpr, MAX_SHIFT: tl.constexpr, INSERTION: tl.constexpr,
):  # fmt: skip
    """weight · dL/da of a sampled chunk that was left out, or of the effect of inserting it, over all later queries."""
    i_hs = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    Hs = tl.num_programs(1)
    i_r = i_hs // G
    i_begin, i_length, i_first, i_start = _tile_position(
        tl.program_id(0), T, p_cu_seqlens, p_first_chunk, p_sequence, p_tile_start, C, VARLEN
    )
    if not VARLEN:  # the sampled chunks in order, those with most queries first
        m_used = tl.program_id(0) < tl.load(p_count + (i_b * R + i_r) * (N + 1) + N)
        i_start = tl.load(p_starts + (i_b * R + i_r) * N + tl.program_id(0), mask=m_used, other=T)
    i_place = i_b * N + i_first + i_start // C
    weight = tl.load(p_sampled + i_place * R + i_r, mask=i_start < i_length, other=0.0)
    if weight == 0.0:
        return
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    i_row = i_begin + i_start
    p_k = p_k + i_b * s_k_b + i_hs * s_k_h + i_row * s_k_t
    p_v = p_v + i_b * s_v_b + i_hs * s_v_h + i_row * s_v_t
    # a chunk that is not the last is complete, and no query sees the last
    m_valid = o_n < tl.where(i_start + C <= i_length, BLOCK_N, 0)
    b_k = _load_tile(p_k, o_n, s_k_t, m_valid, Ks, BLOCK_K, True)
    b_v = _load_tile(p_v, o_n, s_v_t, m_valid, Vs, BLOCK_V, True)
    b_gain = tl.zeros([BLOCK_M], tl.float32)
    for i_j in range(J):
        i_hq = i_hs * J + i_j
        p_q_head = p_q + i_b * s_q_b + i_hq * s_q_h
        p_do_head = p_do + i_b * s_do_b + i_hq * s_do_h
        i_stat = (i_b * Hs * J + i_hq) * _stat_stride(T) + i_begin
        for i_t in range(i_start + C, i_length, BLOCK_M):
            i_base = i_begin + i_t  # 64 bits
            m_inside = i_t + o_m < i_length
            b_q = _load_tile(p_q_head + i_base * s_q_t, o_m, s_q_t, m_inside, Ks, BLOCK_K, True, True)
            b_do = _load_tile(p_do_head + i_base * s_do_t, o_m, s_do_t, m_inside, Vs, BLOCK_V, True, True)
            b_lse = tl.load(p_lse + i_stat + i_t + o_m, mask=m_inside, other=0.0)
            b_delta = tl.load(p_delta + i_stat + i_t + o_m, mask=m_inside, other=0.0)
            # such a chunk may score far above the row's lse: the sums are shifted by its own maximum, if that is > 0
            b_shift = tl.zeros([BLOCK_M], tl.float32)
            b_effect = tl.zeros([BLOCK_M], tl.float32)
            b_sum = tl.zeros([BLOCK_M], tl.float32)
            for i_block in tl.range(0, C // BLOCK_N, num_stages=1):
                if BLOCK_N < C:
                    b_k = _load_tile(p_k + i_block * BLOCK_N * s_k_t, o_n, s_k_t, o_n, Ks, BLOCK_K, False)
                    b_v = _load_tile(p_v + i_block * BLOCK_N * s_v_t, o_n, s_v_t, o_n, Vs, BLOCK_V, False)
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
                b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
                b_new = tl.maximum(b_shift, tl.max(b_s, 1) * scale - b_lse)
                b_keep = tl.exp2(b_shift - b_new)
                b_e = tl.exp2(b_s * scale - (b_lse + b_new)[:, None])
                b_effect = b_effect * b_keep + tl.sum(b_e * b_dp, 1)
                b_sum = b_sum * b_keep + tl.sum(b_e, 1)
                b_shift = b_new
            b_effect -= b_delta * b_sum
            if INSERTION:
                b_gain += b_effect / (tl.exp2(-b_shift) + b_sum)
            else:
                b_gain += b_effect * tl.exp2(tl.minimum(b_shift, MAX_SHIFT))
    tl.store(p_da + (i_place * Hs + i_hs) * PARTS, tl.sum(b_gain, 0) * weight)
