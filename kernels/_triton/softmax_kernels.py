# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernels of ``routed_softmax``: attention over the own chunk and a list of kept chunks, forward and backward.

Shapes: B batch, T tokens, C chunk size, N chunks, R routing heads, Hs key heads, Hq query heads, J = Hq/Hs query heads
per key head, G = Hs/R key heads per routing head, Ks key width, Vs value width. A chunk is kept where its route is 1.
``starts`` [B,R,N] int32 is the first token of every kept chunk in order and then of the others, ``count`` [B,R,N+1]
int32 the number kept before each chunk. ``lse`` [B,Hq,≥T] float32 is log2 of the sum of exp(scale·q·k) over the
visible keys: log base 2, so that P = exp2(scale·log2(e)·q·k − lse).

The keys of earlier chunks are read as one stream: position p of it lies in kept chunk p // C. All of its chunks are
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
    p_tile, o_row, stride, valid, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHECK: tl.constexpr,
    CONSTANT: tl.constexpr = False,
):  # fmt: skip
    """Rows ``o_row`` of a matrix with unit column stride; zeros past WIDTH and, if CHECK, where not ``valid``.

    CONSTANT: ``stride`` is one.
    """
    o_column = tl.arange(0, BLOCK)
    if CONSTANT:  # a thread of four warps has rows that lie ROWS apart, at a distance that takes no register
        LOADED: tl.constexpr = 128 * 128 // p_tile.dtype.element_ty.primitive_bitwidth
        ROWS: tl.constexpr = LOADED // BLOCK if LOADED > BLOCK else 1
        p_element = p_tile + (o_row & (ROWS - 1))[:, None] * stride + o_column[None, :]
        p_element += (o_row & -ROWS)[:, None] * stride
    else:
        p_element = p_tile + o_row[:, None] * stride + o_column[None, :]
    if WIDTH < BLOCK:
        inside = (o_column < WIDTH)[None, :]
        if CHECK:
            inside = inside & valid[:, None]
        b_tile = tl.load(p_element, mask=inside, other=0.0)
    elif CHECK:
        b_tile = tl.load(p_element, mask=valid[:, None], other=0.0)
    else:
        b_tile = tl.load(p_element)
    return b_tile


@triton.jit
def _store_tile(p_tile, o_row, stride, valid, b_tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store ``b_tile`` [rows, BLOCK] into the valid rows and the first WIDTH columns."""
    o_column = tl.arange(0, BLOCK)
    mask = valid[:, None] & (o_column < WIDTH)[None, :]
    p_element = p_tile + o_row[:, None] * stride + o_column[None, :]
    tl.store(p_element, b_tile.to(p_tile.dtype.element_ty), mask=mask)


@triton.jit
def _stat_stride(T):
    """Length of a head's row of ``lse`` and ``delta``: a multiple of 16, which aligns loads of several numbers."""
    return (T + 15) // 16 * 16


@triton.jit
def _place(i_tile, T, cu_seqlens, first_chunk, owner, tile_start, BLOCK: tl.constexpr, VARLEN: tl.constexpr):
    """Where tile ``i_tile`` lies: first token, length and first chunk of its sequence, and its start inside it."""
    if VARLEN:
        i_sequence = tl.load(owner + i_tile)
        used = i_sequence >= 0
        i_begin = tl.load(cu_seqlens + i_sequence, mask=used, other=0)
        i_length = tl.load(cu_seqlens + i_sequence + 1, mask=used, other=0) - i_begin
        i_first = tl.load(first_chunk + i_sequence, mask=used, other=0)
        i_start = tl.load(tile_start + i_tile, mask=used, other=0)
    else:
        i_begin = i_tile * 0
        i_length = T
        i_first = i_tile * 0
        i_start = i_tile * BLOCK
    return i_begin.to(tl.int64), i_length, i_first, i_start


@triton.jit
def _kept_before(starts, count, i_list, N, i_first, i_chunk, C: tl.constexpr):
    """The list of a sequence's kept chunks and how many of its positions lie before chunk ``i_chunk`` of it.

    ``i_list``: batch element and routing head; ``i_first``: the sequence's first chunk.
    """
    p_count = count + i_list * (N + 1) + i_first
    i_entry = tl.load(p_count)
    return starts + i_list * N + i_entry, (tl.load(p_count + i_chunk) - i_entry) * C


@triton.jit
def _stream_tokens(p_list, i, i_total, C: tl.constexpr, BLOCK: tl.constexpr):
    """First tokens of the chunks at stream positions i … i + BLOCK: one number if BLOCK ≤ C, else one per position."""
    if BLOCK <= C:
        i_token = tl.load(p_list + i // C, mask=i < i_total, other=0)
    else:
        o_place = i + tl.arange(0, BLOCK)
        i_token = tl.load(p_list + o_place // C, mask=o_place < i_total, other=0)
    return i_token


@triton.jit
def _stream_place(i_token, i, C: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of stream positions i … i + BLOCK, from ``_stream_tokens``: a number of 64 bits and rows relative to it."""
    o_row = tl.arange(0, BLOCK)
    if BLOCK <= C:
        i_here = (i_token + i % C).to(tl.int64)
    else:
        i_here = 0
        o_row = (i_token + o_row % C).to(tl.int64)
    return i_here, o_row


@triton.jit
def _stream_rows(p_list, i_start, i_total, T, C: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens of stream positions i_start … i_start + BLOCK; T past its end."""
    o_place = i_start + tl.arange(0, BLOCK)
    inside = o_place < i_total
    return tl.where(inside, tl.load(p_list + o_place // C, mask=inside, other=0) + o_place % C, T)


@triton.jit
def _own_mask(o_t, i, p_route, R, i_length, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which keys i … i + BLOCK_N of the tile's own chunks the queries ``o_t`` see; ``p_route``: its first."""
    o_s = i + tl.arange(0, BLOCK_N)
    visible = o_s[None, :] <= o_t[:, None]
    if BLOCK_M > C:  # else all keys lie in the one chunk of the tile
        if BLOCK_N <= C:
            kept = tl.load(p_route + i // C * R) > 0.5
            visible = visible & (o_t < tl.where(kept, i_length, (i // C + 1) * C))[:, None]
        else:
            kept = tl.load(p_route + o_s // C * R, mask=o_s < i_length, other=0.0) > 0.5
            visible = visible & (kept[None, :] | ((o_s // C)[None, :] == (o_t // C)[:, None]))
    return visible


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
    b_s, b_v, b_acc, b_max, b_sum, scale, visible,
    MASKED: tl.constexpr, FIXED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the softmax, in base 2; scale > 0. FIXED: ``b_max`` is subtracted as it is, else as it grows."""
    if FIXED:
        b_p = tl.exp2(b_s * scale - b_max[:, None])
        if MASKED:
            b_p = tl.where(visible, b_p, 0.0)
        b_rounded, b_p = _round(b_p, b_v.dtype)
        b_sum += tl.sum(b_p, 1)
        b_acc = tl.dot(b_rounded, b_v, b_acc, input_precision=PRECISION)
    else:
        if MASKED:
            b_s = tl.where(visible, b_s, float("-inf"))
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
    b_q, p_k, p_v, p_route, p_list, i_total, o_t, i_begin, i_own, i_end, i_length, b_max, R, scale, sk_t, sv_t,
    KS: tl.constexpr, VS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FIXED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of P V and of P and what was subtracted: the stream of kept earlier chunks, then the tile's own ones."""
    b_acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    o_n = tl.arange(0, BLOCK_N)
    i_token = _stream_tokens(p_list, 0, i_total, C, BLOCK_N)
    for i in range(0, i_total, BLOCK_N):
        i_here, o_row = _stream_place(i_token, i, C, BLOCK_N)
        inside = i + o_n < i_total
        # the next step's tokens are read a step ahead: their latency stands in front of no load of keys
        i_token = _stream_tokens(p_list, i + BLOCK_N, i_total, C, BLOCK_N)
        b_k = _load_tile(p_k + i_here * sk_t, o_row, sk_t, inside, KS, BLOCK_K, BLOCK_N > C)
        b_v = _load_tile(p_v + i_here * sv_t, o_row, sv_t, inside, VS, BLOCK_V, BLOCK_N > C)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_acc, b_max, b_sum = _attend(
            b_s, b_v, b_acc, b_max, b_sum, scale, inside[None, :], BLOCK_N > C, FIXED, PRECISION
        )
    for i in range(i_own, i_end, BLOCK_N):
        o_s = i + o_n
        i_here = i_begin + i  # 64 bits
        b_k = _load_tile(p_k + i_here * sk_t, o_n, sk_t, o_s < i_length, KS, BLOCK_K, True)
        b_v = _load_tile(p_v + i_here * sv_t, o_n, sv_t, o_s < i_length, VS, BLOCK_V, True)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        visible = _own_mask(o_t, i, p_route, R, i_length, C, BLOCK_M, BLOCK_N)
        b_acc, b_max, b_sum = _attend(b_s, b_v, b_acc, b_max, b_sum, scale, visible, True, FIXED, PRECISION)
    return b_acc, b_max, b_sum


@Launcher
@triton.jit(do_not_specialize=["T", "N"])
def forward_kernel(
    q, k, v, route, starts, count, o, lse, cu_seqlens, first_chunk, owner, tile_start, scale, T, N, R, J, G,
    sq_b, sq_t, sq_h, sk_b, sk_t, sk_h, sv_b, sv_t, sv_h,
    KS: tl.constexpr, VS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M queries of one head.

    What is subtracted from a query's logits is the logit of its own key, not the largest one: P is then a number whose
    sum is at least one, with nearly the same relative error. That saves a quarter of the instructions of each step.
    Where a sum comes out so large that P may have been infinite, or a product with a value was, the tile starts again
    with the running maximum, as always in float16. (A shift known beforehand with a second try: arXiv 2311.01282,
    section 3.)
    """
    i_h = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    # the last tiles of a sequence have the most keys: they go first
    i_tile = tl.program_id(0) if VARLEN else tl.num_programs(0) - 1 - tl.program_id(0)
    i_begin, i_length, i_first, i_start = _place(i_tile, T, cu_seqlens, first_chunk, owner, tile_start, BLOCK_M, VARLEN)
    if i_start >= i_length:
        return
    i_key = (i_h // J).to(tl.int64)
    i_r = i_key // G
    i_row = i_begin + i_start
    i_chunk = i_start // C
    o_m = tl.arange(0, BLOCK_M)
    o_t = i_start + o_m
    p_k = k + i_b * sk_b + i_key * sk_h
    p_v = v + i_b * sv_b + i_key * sv_h
    p_q = q + i_b * sq_b + i_h.to(tl.int64) * sq_h + i_row * sq_t
    b_q = _load_tile(p_q, o_m, sq_t, o_t < i_length, KS, BLOCK_K, True)
    p_list, i_total = _kept_before(starts, count, i_b * R + i_r, N, i_first, i_chunk, C)
    p_route = route + (i_b * N + i_first) * R + i_r
    i_own, i_end = i_chunk * C, tl.minimum(i_start + BLOCK_M, i_length)

    FIXED: tl.constexpr = q.dtype.element_ty != tl.float16
    if FIXED:
        b_key = _load_tile(p_k + i_row * sk_t, o_m, sk_t, o_t < i_length, KS, BLOCK_K, True)
        b_max = tl.sum(b_q.to(tl.float32) * b_key.to(tl.float32), 1) * scale
    else:
        b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_acc, b_max, b_sum = _attend_all(
        b_q, p_k, p_v, p_route, p_list, i_total, o_t, i_begin, i_own, i_end, i_length, b_max, R, scale, sk_t, sv_t,
        KS, VS, BLOCK_K, BLOCK_V, C, BLOCK_M, BLOCK_N, FIXED, PRECISION,
    )  # fmt: skip
    if FIXED:
        b_good = (b_sum < LARGEST_SUM) & (b_sum * LARGEST_SUM > 1.0) & (tl.sum(b_acc * 0.0, 1) == 0.0)
        i_bad = tl.sum(tl.where(b_good | (o_t >= i_length), 0, 1), 0)
        if i_bad > 0:
            i_zero = tl.minimum(i_bad, 0)  # the compiler may not keep the addresses of the first try in registers
            b_q = _load_tile(p_q + i_zero, o_m, sq_t, o_t < i_length, KS, BLOCK_K, True)
            b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
            b_acc, b_max, b_sum = _attend_all(
                b_q, p_k + i_zero, p_v + i_zero, p_route + i_zero, p_list + i_zero, i_total, o_t + i_zero, i_begin,
                i_own, i_end, i_length, b_max, R, scale, sk_t, sv_t,
                KS, VS, BLOCK_K, BLOCK_V, C, BLOCK_M, BLOCK_N, False, PRECISION,
            )  # fmt: skip

    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)  # rows past the end may have seen nothing
    p_o = o + ((i_b * T + i_row) * heads + i_h) * VS
    _store_tile(p_o, o_m, heads * VS, o_t < i_length, b_acc / b_sum[:, None], VS, BLOCK_V)
    i_written = i_length if VARLEN else _stat_stride(T)  # the row's end is nobody's, but not unwritten
    tl.store(lse + (i_b * heads + i_h) * _stat_stride(T) + i_row + o_m, b_max + tl.log2(b_sum), mask=o_t < i_written)


@triton.jit
def _add_dq(b_q, b_k, b_v, b_do, b_lse, b_delta, b_dq, scale, visible, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """dq += dS K with dS = P(dP − δ)."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    b_p = tl.exp2(b_s * scale - b_lse[:, None])
    if MASKED:
        b_p = tl.where(visible, b_p, 0.0)
    b_ds = b_p * (b_dp - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@Launcher
@triton.jit(do_not_specialize=["T", "N"])
def dq_kernel(
    q, k, v, do, o, lse, route, starts, count, dq, delta, cu_seqlens, first_chunk, owner, tile_start,
    scale, scale_out, T, N, R, J, G,
    sq_b, sq_t, sq_h, sk_b, sk_t, sk_h, sv_b, sv_t, sv_h, sd_b, sd_t, sd_h,
    KS: tl.constexpr, VS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """δ = Σ dO·O and dq of one tile of queries of one head; tiled as the forward."""
    i_h = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    i_tile = tl.program_id(0) if VARLEN else tl.num_programs(0) - 1 - tl.program_id(0)
    i_begin, i_length, i_first, i_start = _place(i_tile, T, cu_seqlens, first_chunk, owner, tile_start, BLOCK_M, VARLEN)
    if i_start >= i_length:
        return
    i_key = (i_h // J).to(tl.int64)
    i_r = i_key // G
    i_row = i_begin + i_start
    i_chunk = i_start // C
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_t = i_start + o_m
    p_k = k + i_b * sk_b + i_key * sk_h
    p_v = v + i_b * sv_b + i_key * sv_h
    p_q = q + i_b * sq_b + i_h.to(tl.int64) * sq_h + i_row * sq_t
    p_do = do + i_b * sd_b + i_h.to(tl.int64) * sd_h + i_row * sd_t
    p_o = o + ((i_b * T + i_row) * heads + i_h) * VS
    i_stat = (i_b * heads + i_h) * _stat_stride(T) + i_row
    b_do = _load_tile(p_do, o_m, sd_t, o_t < i_length, VS, BLOCK_V, True)
    b_o = _load_tile(p_o, o_m, heads * VS, o_t < i_length, VS, BLOCK_V, True)
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    tl.store(delta + i_stat + o_m, b_delta, mask=o_t < i_length)
    b_q = _load_tile(p_q, o_m, sq_t, o_t < i_length, KS, BLOCK_K, True)
    b_lse = tl.load(lse + i_stat + o_m, mask=o_t < i_length, other=0.0)

    b_dq = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    p_list, i_total = _kept_before(starts, count, i_b * R + i_r, N, i_first, i_chunk, C)
    i_token = _stream_tokens(p_list, 0, i_total, C, BLOCK_N)
    for i in range(0, i_total, BLOCK_N):
        i_here, o_row = _stream_place(i_token, i, C, BLOCK_N)
        inside = i + o_n < i_total
        i_token = _stream_tokens(p_list, i + BLOCK_N, i_total, C, BLOCK_N)
        b_k = _load_tile(p_k + i_here * sk_t, o_row, sk_t, inside, KS, BLOCK_K, BLOCK_N > C)
        b_v = _load_tile(p_v + i_here * sv_t, o_row, sv_t, inside, VS, BLOCK_V, BLOCK_N > C)
        b_dq = _add_dq(b_q, b_k, b_v, b_do, b_lse, b_delta, b_dq, scale, inside[None, :], BLOCK_N > C, PRECISION)

    p_route = route + (i_b * N + i_first) * R + i_r
    for i in range(i_chunk * C, tl.minimum(i_start + BLOCK_M, i_length), BLOCK_N):
        o_s = i + o_n
        i_here = i_begin + i  # 64 bits
        b_k = _load_tile(p_k + i_here * sk_t, o_n, sk_t, o_s < i_length, KS, BLOCK_K, True)
        b_v = _load_tile(p_v + i_here * sv_t, o_n, sv_t, o_s < i_length, VS, BLOCK_V, True)
        visible = _own_mask(o_t, i, p_route, R, i_length, C, BLOCK_M, BLOCK_N)
        b_dq = _add_dq(b_q, b_k, b_v, b_do, b_lse, b_delta, b_dq, scale, visible, True, PRECISION)

    p_dq = dq + ((i_b * T + i_row) * heads + i_h) * KS
    _store_tile(p_dq, o_m, heads * KS, o_t < i_length, b_dq * scale_out, KS, BLOCK_K)


@triton.jit
def _add_dkv(
    b_q, b_k, b_v, b_do, p_lse, p_delta, inside, b_dk, b_dv, scale, visible, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk += dSᵀ Q and dv += Pᵀ dO, with Sᵀ = K Qᵀ computed directly; also dSᵀ."""
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
    if MASKED:  # queries past the end: dO, dP and δ are 0, and so is what they add
        b_lse = tl.load(p_lse, mask=inside, other=0.0)
        b_p = tl.where(visible, tl.exp2(b_s * scale - b_lse[None, :]), 0.0)
    else:
        b_p = tl.exp2(b_s * scale - tl.load(p_lse)[None, :])
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
    if MASKED:
        b_ds = b_p * (b_dp - tl.load(p_delta, mask=inside, other=0.0)[None, :])
    else:
        b_ds = b_p * (b_dp - tl.load(p_delta)[None, :])
    return tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION), b_dv, b_ds


@Launcher
@triton.jit(do_not_specialize=["T", "N"])
def dkv_kernel(
    q, k, v, do, lse, delta, route, starts, count, dk, dv, da, cu_seqlens, first_chunk, owner, tile_start,
    scale, scale_out, T, N, R, J, G,
    sq_b, sq_t: tl.constexpr, sq_h, sk_b, sk_t, sk_h, sv_b, sv_t, sv_h, sd_b, sd_t: tl.constexpr, sd_h,
    KS: tl.constexpr, VS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, VARLEN: tl.constexpr,
    WANT_ROUTE: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """dk, dv (with ADD added to what is there) and dL/da of one tile of keys of one head.

    A tile is taken from the stream of kept chunks, which later queries see, or from that of the rest, of which only
    the own chunks do. Packed: a tile is a part of one chunk.
    """
    i_key = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    i_r = i_key // G
    i_tile = tl.program_id(0)
    i_begin, i_length, i_first, i_start = _place(i_tile, T, cu_seqlens, first_chunk, owner, tile_start, BLOCK_N, VARLEN)
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    PARTS: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    # o_s: token inside the sequence of every key. Queries come in steps: those of a kept tile from its first key to the
    # end of the sequence, those of another from its first key to the end of the last key's chunk, taken from the same
    # stream as the keys. The first ``masked`` steps and a last one that is not full need the mask and go first; i_end
    # ends the queries of a step.
    if VARLEN:
        i_total = i_length
        kept = tl.load(route + (i_b * N + i_first + i_start // C) * R + i_r, mask=i_start < i_length, other=0.0) > 0.5
        o_s = i_start + o_n
        valid = o_s < i_length
        i_low = i_start
        i_high = tl.minimum((i_start // C + 1) * C, i_length)
        p_list = starts
    else:
        n_kept = tl.load(count + (i_b * R + i_r) * (N + 1) + N)
        kept_tiles = (n_kept * C + BLOCK_N - 1) // BLOCK_N
        kept = i_tile < kept_tiles
        if kept:
            p_list = starts + (i_b * R + i_r) * N
            i_total = n_kept * C
            i_start = i_tile * BLOCK_N
        else:
            p_list = starts + (i_b * R + i_r) * N + n_kept
            i_total = (N - n_kept) * C
            i_start = (i_tile - kept_tiles) * BLOCK_N
        o_s = _stream_rows(p_list, i_start, i_total, T, C, BLOCK_N)
        valid = o_s < T
        i_last = tl.minimum(i_start + BLOCK_N, i_total) - 1
        used = i_start < i_total
        i_low = tl.load(p_list + i_start // C, mask=used, other=0) + i_start % C
        i_high = tl.minimum(tl.load(p_list + i_last // C, mask=used, other=0) + C, T)
    if i_start >= i_total:
        return
    o_row = i_begin + o_s
    b_k = _load_tile(k + i_b * sk_b + i_key * sk_h, o_row, sk_t, valid, KS, BLOCK_K, True)
    b_v = _load_tile(v + i_b * sv_b + i_key * sv_h, o_row, sv_t, valid, VS, BLOCK_V, True)
    o_next = (o_s // C + 1) * C  # the first query of a later chunk
    o_bound = tl.where(kept, i_length, o_next)  # the first query that does not see the key
    masked = (i_high - i_low + BLOCK_M - 1) // BLOCK_M
    if BLOCK_N > C:
        masked = tl.where(kept, masked, (BLOCK_N + BLOCK_M - 1) // BLOCK_M)
        i_end = i_length
        i_stream = tl.where(kept, 0, i_total)
    else:
        i_end = tl.where(kept, i_length, i_high)
        i_stream = 0
    steps = tl.where(kept, (i_length - i_low + BLOCK_M - 1) // BLOCK_M, masked)
    rest = ((steps > masked) & ((i_length - i_low) % BLOCK_M > 0)).to(tl.int32)  # the last step, if it is not full

    b_dk = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    b_da = tl.zeros([BLOCK_N], tl.float32)
    for j in range(J):
        i_h = i_key * J + j
        p_q = q + i_b * sq_b + i_h * sq_h
        p_do = do + i_b * sd_b + i_h * sd_h
        i_stat = (i_b * heads * J + i_h) * _stat_stride(T) + i_begin
        if BLOCK_N > C:
            i_token = _stream_tokens(p_list, i_start, i_stream, C, BLOCK_M)
        for step in range(masked + rest):
            i = tl.where(step < masked, step, steps - 1)
            i_query = i_low + i * BLOCK_M
            if BLOCK_N > C:
                i_place = i_start + i * BLOCK_M
                if BLOCK_M <= C:
                    i_own = tl.where(i_place < i_stream, i_token + i_place % C, (T // 16 + 1) * 16)
                    i_query = tl.multiple_of(tl.where(kept, i_query, i_own), 16)
                    o_t = i_query + o_m
                else:
                    o_own = tl.where(i_place + o_m < i_stream, i_token + (i_place + o_m) % C, T)
                    o_t = tl.where(kept, i_query + o_m, o_own)
                i_token = _stream_tokens(p_list, i_place + BLOCK_M, i_stream, C, BLOCK_M)
            else:
                i_query = tl.multiple_of(i_query, 16)
                o_t = i_query + o_m
            inside = o_t < i_end
            # queries relative to a number: carried along, they would cost a register each
            if BLOCK_M > C and BLOCK_N > C:
                i_shift = 0
                o_query = o_t.to(tl.int64)
            else:
                i_shift = i_query
                o_query = o_m
            i_here = i_begin + i_shift  # 64 bits
            b_q = _load_tile(p_q + i_here * sq_t, o_query, sq_t, inside, KS, BLOCK_K, True, True)
            b_do = _load_tile(p_do + i_here * sd_t, o_query, sd_t, inside, VS, BLOCK_V, True, True)
            visible = (o_s - i_shift)[:, None] <= o_query[None, :]
            visible = visible & (o_query[None, :] < (o_bound - i_shift)[:, None])
            o_stat = i_stat + o_t
            b_dk, b_dv, b_ds = _add_dkv(
                b_q, b_k, b_v, b_do, lse + o_stat, delta + o_stat, inside, b_dk, b_dv, scale, visible, True, PRECISION
            )
            if WANT_ROUTE:
                b_da += tl.sum(tl.where(o_query[None, :] >= (o_next - i_shift)[:, None], b_ds, 0.0), 1)
        for i in range(masked, steps - rest):
            i_query = tl.multiple_of(i_low + i * BLOCK_M, 16)
            i_here = i_begin + i_query  # 64 bits
            b_q = _load_tile(p_q + i_here * sq_t, o_m, sq_t, o_m, KS, BLOCK_K, False, True)
            b_do = _load_tile(p_do + i_here * sd_t, o_m, sd_t, o_m, VS, BLOCK_V, False, True)
            o_stat = i_stat + i_query + o_m
            b_dk, b_dv, b_ds = _add_dkv(
                b_q, b_k, b_v, b_do, lse + o_stat, delta + o_stat, o_m, b_dk, b_dv, scale, o_m, False, PRECISION
            )
            if WANT_ROUTE:
                b_da += tl.sum(b_ds, 1)

    if not VARLEN:  # read again: kept in registers, they would displace the sums
        o_s = _stream_rows(p_list, i_start, i_total, T, C, BLOCK_N)
    o_row = i_begin + o_s
    valid = o_s < i_length
    i_out = i_b * T * heads + i_key
    _store_tile(dk + i_out * KS, o_row, heads * KS, valid, b_dk * scale_out, KS, BLOCK_K)
    p_dv = dv + i_out * VS
    if ADD:
        b_dv += _load_tile(p_dv, o_row, heads * VS, valid, VS, BLOCK_V, True).to(tl.float32)
    _store_tile(p_dv, o_row, heads * VS, valid, b_dv, VS, BLOCK_V)
    if WANT_ROUTE:
        b_da = tl.where(valid, b_da, 0.0)
        if BLOCK_N > C:
            o_chunk = tl.arange(0, BLOCK_N // C)
            o_place = i_start // C + o_chunk
            i_chunk = tl.load(p_list + o_place, mask=o_place < i_total // C, other=0) // C
            b_sum = tl.sum(tl.reshape(b_da, [BLOCK_N // C, C]), 1)
            b_sum = tl.where(kept, b_sum, 0.0)
            tl.store(da + (i_b * N + i_chunk) * heads + i_key, b_sum, mask=o_place < i_total // C)
        else:
            i_place = (i_b * N + i_first + i_low // C) * heads + i_key
            tl.store(da + i_place * PARTS + i_low % C // BLOCK_N, tl.where(kept, tl.sum(b_da, 0), 0.0))


@Launcher
@triton.jit(do_not_specialize=["T", "N"])
def counterfactual_kernel(
    q, k, v, do, lse, delta, weight, starts, count, da, cu_seqlens, first_chunk, owner, tile_start,
    scale, T, N, R, J, G,
    sq_b, sq_t: tl.constexpr, sq_h, sk_b, sk_t, sk_h, sv_b, sv_t, sv_h, sd_b, sd_t: tl.constexpr, sd_h,
    KS: tl.constexpr, VS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, VARLEN: tl.constexpr,
    PARTS: tl.constexpr, MAX_SHIFT: tl.constexpr, INSERTION: tl.constexpr,
):  # fmt: skip
    """weight · dL/da of one chunk that was left out, or the effect of inserting it, summed over all later queries."""
    i_key = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    i_r = i_key // G
    i_begin, i_length, i_first, i_start = _place(
        tl.program_id(0), T, cu_seqlens, first_chunk, owner, tile_start, C, VARLEN
    )
    if not VARLEN:  # the sampled chunks in order, those with most queries first
        used = tl.program_id(0) < tl.load(count + (i_b * R + i_r) * (N + 1) + N)
        i_start = tl.load(starts + (i_b * R + i_r) * N + tl.program_id(0), mask=used, other=T)
    i_place = i_b * N + i_first + i_start // C
    b_weight = tl.load(weight + i_place * R + i_r, mask=i_start < i_length, other=0.0)
    if b_weight == 0.0:
        return
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    i_row = i_begin + i_start
    p_k = k + i_b * sk_b + i_key * sk_h + i_row * sk_t
    p_v = v + i_b * sv_b + i_key * sv_h + i_row * sv_t
    # a chunk that is not the last is complete, and no query sees the last
    valid = o_n < tl.where(i_start + C <= i_length, BLOCK_N, 0)
    b_k = _load_tile(p_k, o_n, sk_t, valid, KS, BLOCK_K, True)
    b_v = _load_tile(p_v, o_n, sv_t, valid, VS, BLOCK_V, True)
    b_gain = tl.zeros([BLOCK_M], tl.float32)
    for j in range(J):
        i_h = i_key * J + j
        p_q = q + i_b * sq_b + i_h * sq_h
        p_do = do + i_b * sd_b + i_h * sd_h
        i_stat = (i_b * heads * J + i_h) * _stat_stride(T) + i_begin
        for i in range(i_start + C, i_length, BLOCK_M):
            i_here = i_begin + i  # 64 bits
            inside = i + o_m < i_length
            b_q = _load_tile(p_q + i_here * sq_t, o_m, sq_t, inside, KS, BLOCK_K, True, True)
            b_do = _load_tile(p_do + i_here * sd_t, o_m, sd_t, inside, VS, BLOCK_V, True, True)
            b_lse = tl.load(lse + i_stat + i + o_m, mask=inside, other=0.0)
            b_delta = tl.load(delta + i_stat + i + o_m, mask=inside, other=0.0)
            # such a chunk may score far above the row's lse: the sums are shifted by its own maximum, if that is > 0
            b_shift = tl.zeros([BLOCK_M], tl.float32)
            b_effect = tl.zeros([BLOCK_M], tl.float32)
            b_sum = tl.zeros([BLOCK_M], tl.float32)
            for i_block in tl.range(0, C // BLOCK_N, num_stages=1):
                if BLOCK_N < C:
                    b_k = _load_tile(p_k + i_block * BLOCK_N * sk_t, o_n, sk_t, o_n, KS, BLOCK_K, False)
                    b_v = _load_tile(p_v + i_block * BLOCK_N * sv_t, o_n, sv_t, o_n, VS, BLOCK_V, False)
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
    tl.store(da + (i_place * heads + i_key) * PARTS, tl.sum(b_gain, 0) * b_weight)
