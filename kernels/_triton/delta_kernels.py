# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined"
"""Triton kernels of the routed delta rule: chunked Gated DeltaNet whose scan visits only the written chunks.

Shapes: B batch, T tokens, C chunk size, N chunks, R routing heads, K key width, V value width, M slots of states per
head. Buffers between the kernels are contiguous; those of one number per chunk are [B,N,R] or, where a scan reads them
in order (total, written, count, gap, slot), [B,R,N].
Names: p_ pointer, s_ stride, i_ index or bound, n_ count, o_ offsets, b_ block in registers, m_ mask.

Per chunk, with G the cumulative sum of g inside it, D_ij = exp(G_i − G_j) for i ≥ j, k̂ and q̂ the normalised keys and
queries, S the state at its start, r = 1 if the chunk is written (route 0) and 0 if softmax keeps it:

    A  = (I + strict_lower(β k̂ k̂ᵀ ∘ D))⁻¹      W = A diag(β e^G) k̂       P = scale · lower(q̂ k̂ᵀ) ∘ D
    Vn = A diag(β) v − W S                       O = Qe S + P A diag(β) v   with Qe = scale · e^G q̂ − P W
    S' = e^{G_last} S + r k_eᵀ Vn                with k_e = e^{G_last − G} k̂

``prepare`` makes W, Qe, A, P and P A of every chunk at once; ``gaps`` lists the written chunks and the decay since the
last of them; ``scan`` visits only these and leaves the state after each; ``output`` is parallel again. A chunk that
softmax keeps costs the scan nothing: its S is the last state times exp(gap). Backward: one scan for the gradient of the
state at the end of every chunk, then two kernels per chunk for everything else.

Source: Gated DeltaNet, arXiv 2412.06464; routing, arXiv 2602.03681, section 3.
"""

from __future__ import annotations

import triton
import triton.language as tl

from natsl.kernels.launch.launcher import Launcher

# A decay below e^-50 is none in float32, and a finite bound makes cumulative sums of it possible. A chunk's sums and
# their differences are float64 for float32 inputs; in half precision float32 is far finer than the inputs.
MIN_LOG_DECAY = tl.constexpr(-50.0)


@triton.jit
def _bounds(i_n, T, p_start, p_end, C: tl.constexpr, VARLEN: tl.constexpr):
    """First token of a chunk and the end of its sequence."""
    if VARLEN:
        i_start = tl.load(p_start + i_n)
        i_end = tl.load(p_end + i_n)
    else:
        i_start = i_n * C
        i_end = T
    return i_start, i_end


@triton.jit
def _chunks_of(i_s, p_offset, N, VARLEN: tl.constexpr):
    """Batch element of a sequence, its index among those packed into it, its first chunk and the end of its chunks."""
    if VARLEN:
        i_b, i_packed = i_s * 0, i_s
        i_n_first, i_n_end = tl.load(p_offset + i_s), tl.load(p_offset + i_s + 1)
    else:
        i_b, i_packed = i_s, i_s * 0
        i_n_first, i_n_end = i_s * 0, N
    return i_b, i_packed, i_n_first, i_n_end


@triton.jit
def _load_tile(p_tile, o_row, s_row, o_column, m_row, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Rows ``o_row`` of a matrix with unit column stride; zeros where not ``m_row`` and past WIDTH (never if EVEN)."""
    m_tile = m_row[:, None]
    if not EVEN:
        m_tile = m_tile & (o_column < WIDTH)[None, :]
    return tl.load(p_tile + o_row[:, None] * s_row + o_column[None, :], mask=m_tile, other=0.0)


@triton.jit
def _load_buffer(p_tile, o_row, o_column, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """The same of a contiguous buffer [rows,WIDTH], all rows of which exist."""
    p_element = p_tile + o_row[:, None] * WIDTH + o_column[None, :]
    if EVEN:
        b_tile = tl.load(p_element)
    else:
        b_tile = tl.load(p_element, mask=(o_column < WIDTH)[None, :], other=0.0)
    return b_tile


@triton.jit
def _store_buffer(p_tile, b_tile, o_row, o_column, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Store ``b_tile`` where ``_load_buffer`` would read it."""
    p_element = p_tile + o_row[:, None] * WIDTH + o_column[None, :]
    if EVEN:
        tl.store(p_element, b_tile.to(p_tile.dtype.element_ty))
    else:
        tl.store(p_element, b_tile.to(p_tile.dtype.element_ty), mask=(o_column < WIDTH)[None, :])


@triton.jit
def _unit_lower_inverse(b_l, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + L)⁻¹ of a strictly lower L [C,C] float32: substitution in the 16×16 blocks of the diagonal, all at once,
    then the nilpotent series over blocks, which has at most C/16 terms."""
    NB: tl.constexpr = C // 16
    o_c = tl.arange(0, C)
    m_same = (o_c[:, None] // 16) == (o_c[None, :] // 16)
    b_blocks = tl.sum(tl.reshape(tl.where(m_same, b_l, 0.0), (NB, 16, NB, 16)), 2)  # [NB,16,16]
    o_row = tl.arange(0, 16)[None, :, None]
    o_column = tl.arange(0, 16)[None, None, :]
    b_inverse = tl.where(o_row == o_column, 1.0, 0.0) + tl.zeros((NB, 16, 16), tl.float32)
    for i in range(1, 16):
        b_row = tl.sum(tl.where(o_row == i, b_blocks, 0.0), 1)  # [NB,16]
        b_next = tl.sum(b_row[:, :, None] * b_inverse, 1)  # [NB,16]
        b_inverse = tl.where(o_row == i, b_inverse - b_next[:, None, :], b_inverse)
    if NB == 1:
        b_result = tl.reshape(b_inverse, (C, C))
    else:
        o_block = tl.arange(0, NB)
        m_diagonal = (o_block[:, None] == o_block[None, :])[:, None, :, None]
        b_wide = tl.where(m_diagonal, b_inverse[:, :, None, :], 0.0)
        b_diagonal = tl.reshape(b_wide, (C, C))
        b_x = tl.dot(b_diagonal, tl.where(m_same, 0.0, b_l), input_precision=PRECISION)
        b_result = b_diagonal - tl.dot(b_x, b_diagonal, input_precision=PRECISION)
        if NB > 2:
            b_x = tl.dot(b_x, b_x, input_precision=PRECISION)
            b_result += tl.dot(b_x, b_result, input_precision=PRECISION)
        if NB > 4:
            b_x = tl.dot(b_x, b_x, input_precision=PRECISION)
            b_result += tl.dot(b_x, b_result, input_precision=PRECISION)
    return b_result


@triton.jit
def _decay(b_g, C: tl.constexpr):
    """D_ij = exp(G_i − G_j) for i ≥ j, else 0."""
    o_c = tl.arange(0, C)
    m_lower = o_c[:, None] >= o_c[None, :]
    b_difference = tl.where(m_lower, b_g[:, None] - b_g[None, :], 0.0).to(tl.float32)
    return tl.where(m_lower, tl.exp(b_difference), 0.0)


@Launcher
@triton.jit(do_not_specialize=["T", "N"])
def delta_prepare_kernel(
    p_q, p_k, p_g, p_beta, p_start, p_end,
    p_w, p_qe, p_a, p_p, p_pa, p_cum, p_rq, p_rk, p_total,
    T, N, scale,
    s_q_b, s_q_t, s_q_h, s_k_b, s_k_t, s_k_h,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    NORMALISE: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """W, Qe, A, P, P A, G, the inverse norms of q and k and the total decay of one chunk and head."""
    i_n = tl.program_id(0)
    i_b, i_r = tl.program_id(1) // R, tl.program_id(1) % R
    i_start, i_end = _bounds(i_n, T, p_start, p_end, C, VARLEN)
    EVEN: tl.constexpr = K % BK == 0
    dtype = p_w.dtype.element_ty
    o_c = tl.arange(0, C)
    m_row = i_start + o_c < i_end
    i_row = i_b.to(tl.int64) * T + i_start
    i_place = (i_b.to(tl.int64) * N + i_n) * R + i_r  # of this chunk and head in the buffers [B,N,R,…]
    o_scalar = (i_row + o_c) * R + i_r
    b_g = tl.load(p_g + o_scalar, mask=m_row, other=0.0)
    b_beta = tl.load(p_beta + o_scalar, mask=m_row, other=0.0)
    b_g = tl.where(b_g < MIN_LOG_DECAY, MIN_LOG_DECAY, b_g)  # NaN stays
    b_g = b_g.to(p_cum.dtype.element_ty)
    b_cum = tl.cumsum(b_g, 0)
    tl.store(p_cum + i_place * C + o_c, b_cum)
    tl.store(p_total + (i_b.to(tl.int64) * R + i_r) * N + i_n, tl.sum(b_g, 0))
    p_k = p_k + i_b.to(tl.int64) * s_k_b + i_start.to(tl.int64) * s_k_t + i_r.to(tl.int64) * s_k_h
    p_q = p_q + i_b.to(tl.int64) * s_q_b + i_start.to(tl.int64) * s_q_t + i_r.to(tl.int64) * s_q_h

    b_kk = tl.zeros((C, C), tl.float32)
    b_qk = tl.zeros((C, C), tl.float32)
    b_rk = tl.zeros((C,), tl.float32)
    b_rq = tl.zeros((C,), tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        b_k = _load_tile(p_k, o_c, s_k_t, o_k, m_row, K, EVEN)
        b_q = _load_tile(p_q, o_c, s_q_t, o_k, m_row, K, EVEN)
        b_kk += tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
        b_qk += tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_k, b_q = b_k.to(tl.float32), b_q.to(tl.float32)
        b_rk += tl.sum(b_k * b_k, 1)
        b_rq += tl.sum(b_q * b_q, 1)
    if NORMALISE:
        b_rk, b_rq = tl.rsqrt(b_rk + 1e-6), tl.rsqrt(b_rq + 1e-6)
    else:
        b_rk, b_rq = tl.full((C,), 1.0, tl.float32), tl.full((C,), 1.0, tl.float32)
    tl.store(p_rk + i_place * C + o_c, b_rk)
    tl.store(p_rq + i_place * C + o_c, b_rq)
    b_rq = b_rq * scale
    b_decay = _decay(b_cum, C)
    b_l = tl.where(o_c[:, None] > o_c[None, :], b_kk * b_decay * (b_rk * b_beta)[:, None] * b_rk[None, :], 0.0)
    b_a = _unit_lower_inverse(b_l, C, SOLVE)
    o_a = i_place * C * C
    _store_buffer(p_a + o_a, b_a, o_c, o_c, C, True)
    b_p = (b_qk * b_decay * (b_rq[:, None] * b_rk[None, :])).to(dtype)
    _store_buffer(p_p + o_a, b_p, o_c, o_c, C, True)
    b_pa = tl.dot(b_p, b_a.to(dtype), input_precision=PRECISION)
    _store_buffer(p_pa + o_a, b_pa, o_c, o_c, C, True)
    b_from_start = tl.exp(b_cum.to(tl.float32))
    b_aw = (b_a * (b_beta * b_from_start * b_rk)[None, :]).to(dtype)
    b_rq = b_rq * b_from_start
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        b_k = _load_tile(p_k, o_c, s_k_t, o_k, m_row, K, EVEN)
        b_w = tl.dot(b_aw, b_k, input_precision=PRECISION).to(dtype)
        _store_buffer(p_w + i_place * C * K, b_w, o_c, o_k, K, EVEN)
        b_q = _load_tile(p_q, o_c, s_q_t, o_k, m_row, K, EVEN).to(tl.float32)
        b_qe = b_q * b_rq[:, None] - tl.dot(b_p, b_w, input_precision=PRECISION)
        _store_buffer(p_qe + i_place * C * K, b_qe, o_c, o_k, K, EVEN)


@triton.jit
def _segmented_sum(b_sum, b_reset, b_next_sum, b_next_reset):
    """Combines two pairs of a scan that starts anew at every reset."""
    return tl.where(b_next_reset > 0, b_next_sum, b_sum + b_next_sum), tl.maximum(b_reset, b_next_reset)


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b)


@Launcher
@triton.jit(do_not_specialize=["N"])
def delta_gaps_kernel(
    p_route, p_total, p_sequence,
    p_written, p_count, p_gap, p_slot,
    N,
    R: tl.constexpr, BLOCK: tl.constexpr, HAS_INITIAL: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Written chunks of one head in order, how many come before each chunk, the log decay since the last one's end, and
    the slot of the state that a chunk starts from (−1: zero)."""
    i_b, i_r = tl.program_id(0) // R, tl.program_id(0) % R
    i_head = (i_b.to(tl.int64) * R + i_r) * N
    n_written = 0
    gap = 0.0
    n_before = 0  # written before the first chunk of the running sequence
    tl.store(p_count + i_head + (i_b * R + i_r), 0)
    for i_block in range(0, N, BLOCK):
        o_n = i_block + tl.arange(0, BLOCK)
        m_n = o_n < N
        b_route = tl.load(p_route + (i_b.to(tl.int64) * N + o_n) * R + i_r, mask=m_n, other=1.0)
        b_written = (b_route < 0.5).to(tl.int32)
        m_previous = m_n & (o_n > 0)
        b_previous_route = tl.load(p_route + (i_b.to(tl.int64) * N + o_n - 1) * R + i_r, mask=m_previous, other=1.0)
        b_previous_written = (b_previous_route < 0.5).to(tl.int32)
        if VARLEN:
            b_sequence = tl.load(p_sequence + o_n, mask=m_n, other=-1)
            m_new = b_sequence != tl.load(p_sequence + o_n - 1, mask=m_previous, other=-1)
        else:
            b_sequence = tl.zeros((BLOCK,), tl.int32)
            m_new = o_n == 0
        b_total = tl.load(p_total + i_head + o_n - 1, mask=m_previous, other=0.0).to(tl.float32)
        b_reset = ((b_previous_written > 0) | m_new).to(tl.int32)
        b_step = tl.where(b_reset > 0, 0.0, b_total)
        b_gap, b_seen = tl.associative_scan((b_step, b_reset), 0, _segmented_sum)
        b_gap = tl.where(b_seen > 0, b_gap, b_gap + gap)
        b_before = n_written + tl.cumsum(b_written, 0) - b_written
        tl.store(p_written + i_head + b_before, o_n, mask=m_n & (b_written > 0))
        tl.store(p_count + i_head + (i_b * R + i_r) + o_n + 1, b_before + b_written, mask=m_n)
        tl.store(p_gap + i_head + o_n, b_gap, mask=m_n)
        # counts never fall, so the newest sequence's value at its first chunk is the maximum so far
        b_origin = tl.associative_scan(tl.where(m_new, b_before, -1), 0, _maximum)
        b_origin = tl.maximum(b_origin, n_before)
        b_slot = b_before + b_sequence
        if not HAS_INITIAL:
            b_slot = tl.where(b_before > b_origin, b_slot, -1)
        tl.store(p_slot + i_head + o_n, b_slot, mask=m_n)
        n_written += tl.sum(b_written, 0)
        m_end = o_n == i_block + BLOCK - 1
        gap = tl.sum(tl.where(m_end, b_gap, 0.0), 0)
        n_before = tl.max(b_origin, 0)


@Launcher
@triton.jit(do_not_specialize=["T", "N", "M"])
def delta_scan_kernel(
    p_k, p_v, p_w, p_a, p_beta, p_cum, p_rk, p_total, p_written, p_count, p_gap, p_start, p_end, p_offset,
    p_initial, p_state, p_final,
    T, N, M,
    s_k_b, s_k_t, s_k_h, s_v_b, s_v_t, s_v_h,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, HAS_BORDER: tl.constexpr, VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """State after every written chunk of one sequence and head, for BV of the value columns.

    HAS_BORDER: the last chunk is written, and the final states are followed by those that it starts from.
    """
    i_v = tl.program_id(0)
    i_s, i_r = tl.program_id(1) // R, tl.program_id(1) % R
    i_b, i_packed, i_n_first, i_n_end = _chunks_of(i_s, p_offset, N, VARLEN)
    EVEN_K: tl.constexpr = BK == K
    EVEN_V: tl.constexpr = V % BV == 0
    dtype = p_state.dtype.element_ty
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    i_b64 = i_b.to(tl.int64)
    i_head = (i_b64 * R + i_r) * N
    p_count = p_count + i_head + (i_b * R + i_r)
    i_entry = tl.load(p_count + i_n_first)
    i_entry_end = tl.load(p_count + i_n_end)
    p_k += i_b64 * s_k_b + i_r.to(tl.int64) * s_k_h
    p_v += i_b64 * s_v_b + i_r.to(tl.int64) * s_v_h
    m_state = (o_k < K)[:, None] & (o_v < V)[None, :]
    o_state = o_k[:, None] * V + o_v[None, :]
    p_state += ((i_b64 * R + i_r) * M + i_packed + i_entry) * K * V
    b_s = tl.zeros((BK, BV), tl.float32)
    if HAS_INITIAL:
        b_s = tl.load(p_initial + (i_s.to(tl.int64) * R + i_r) * K * V + o_state, mask=m_state, other=0.0)
        tl.store(p_state + o_state, b_s.to(dtype), mask=m_state)
    for i_j in range(i_entry, i_entry_end):
        i_n = tl.load(p_written + i_head + i_j)
        i_start, i_end = _bounds(i_n, T, p_start, p_end, C, VARLEN)
        m_row = i_start + o_c < i_end
        i_place = (i_b64 * N + i_n) * R + i_r
        b_k = _load_tile(p_k + i_start.to(tl.int64) * s_k_t, o_c, s_k_t, o_k, m_row, K, EVEN_K)
        b_v = _load_tile(p_v + i_start.to(tl.int64) * s_v_t, o_c, s_v_t, o_v, m_row, V, EVEN_V)
        b_w = _load_buffer(p_w + i_place * C * K, o_c, o_k, K, EVEN_K)
        b_a = _load_buffer(p_a + i_place * C * C, o_c, o_c, C, True)
        b_beta = tl.load(p_beta + (i_b64 * T + i_start + o_c) * R + i_r, mask=m_row, other=0.0)
        b_cum = tl.load(p_cum + i_place * C + o_c)
        b_rk = tl.load(p_rk + i_place * C + o_c)
        total = tl.load(p_total + i_head + i_n)
        gap = tl.load(p_gap + i_head + i_n)
        if HAS_BORDER:
            m_border = (o_k < K)[:, None] & (o_v < tl.where(i_j == i_entry_end - 1, V, 0))[None, :]
            p_border = p_final + (tl.num_programs(1) + i_s * R + i_r).to(tl.int64) * K * V
            tl.store(p_border + o_state, b_s * tl.exp(gap), mask=m_border)
        b_vn = tl.dot(b_a, (b_v * b_beta[:, None]).to(dtype), input_precision=PRECISION)
        b_vn -= tl.dot(b_w, b_s.to(dtype), input_precision=PRECISION) * tl.exp(gap)
        b_vn = b_vn * (b_rk * tl.exp((total - b_cum).to(tl.float32)))[:, None]
        b_s = b_s * tl.exp(gap + total.to(tl.float32))
        b_s += tl.dot(tl.trans(b_k), b_vn.to(dtype), input_precision=PRECISION)
        p_state += K * V
        tl.store(p_state + o_state, b_s.to(dtype), mask=m_state)
    if HAS_FINAL:
        if i_n_end > i_n_first:
            written = tl.load(p_count + i_n_end) > tl.load(p_count + i_n_end - 1)
            decay = tl.load(p_gap + i_head + i_n_end - 1) + tl.load(p_total + i_head + i_n_end - 1).to(tl.float32)
            b_s = b_s * tl.exp(tl.where(written, 0.0, decay))
        tl.store(p_final + (i_s.to(tl.int64) * R + i_r) * K * V + o_state, b_s, mask=m_state)


@triton.jit
def _load_state(p_state, o_k, o_v, K: tl.constexpr, V: tl.constexpr, EVEN: tl.constexpr):
    """Tile [BK,BV] of a state [K,V]."""
    p_element = p_state + o_k[:, None] * V + o_v[None, :]
    if EVEN:
        b_tile = tl.load(p_element)
    else:
        b_tile = tl.load(p_element, mask=(o_k < K)[:, None] & (o_v < V)[None, :], other=0.0)
    return b_tile


@triton.jit
def _load_start(p_state, i_slot, o_k, o_v, K: tl.constexpr, V: tl.constexpr):
    """Tile [BK,BV] of the state in a slot; slot −1 holds zeros."""
    p_element = p_state + tl.maximum(i_slot, 0).to(tl.int64) * (K * V) + o_k[:, None] * V + o_v[None, :]
    m_tile = (o_k < tl.where(i_slot >= 0, K, 0))[:, None] & (o_v < V)[None, :]
    return tl.load(p_element, mask=m_tile, other=0.0)


@Launcher
@triton.jit(do_not_specialize=["T", "N", "M"])
def delta_output_kernel(
    p_v, p_qe, p_pa, p_beta, p_state, p_slot, p_gap, p_start, p_end,
    p_o,
    T, N, M,
    s_v_b, s_v_t, s_v_h,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O of one chunk and head, for BV of the value columns."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v, i_n = tl.program_id(0) % NV, tl.program_id(0) // NV
    i_b, i_r = tl.program_id(1) // R, tl.program_id(1) % R
    i_start, i_end = _bounds(i_n, T, p_start, p_end, C, VARLEN)
    EVEN_K: tl.constexpr = BK == K
    EVEN_V: tl.constexpr = V % BV == 0
    dtype = p_o.dtype.element_ty
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_row = i_start + o_c < i_end
    i_b64 = i_b.to(tl.int64)
    i_row = i_b64 * T + i_start
    i_place = (i_b64 * N + i_n) * R + i_r
    i_head = (i_b64 * R + i_r) * N
    i_slot = tl.load(p_slot + i_head + i_n)
    gap = tl.load(p_gap + i_head + i_n)
    b_qe = _load_buffer(p_qe + i_place * C * K, o_c, o_k, K, EVEN_K)
    p_state = p_state + (i_b64 * R + i_r) * M * K * V
    b_s = _load_start(p_state, i_slot, o_k, o_v, K, V)
    b_o = tl.dot(b_qe, b_s, input_precision=PRECISION) * tl.exp(gap)
    p_v = p_v + i_b64 * s_v_b + i_start.to(tl.int64) * s_v_t + i_r.to(tl.int64) * s_v_h
    b_v = _load_tile(p_v, o_c, s_v_t, o_v, m_row, V, EVEN_V)
    b_beta = tl.load(p_beta + (i_row + o_c) * R + i_r, mask=m_row, other=0.0)
    b_pa = _load_buffer(p_pa + i_place * C * C, o_c, o_c, C, True)
    b_o += tl.dot(b_pa, (b_v * b_beta[:, None]).to(dtype), input_precision=PRECISION)
    p_element = p_o + (i_row * R + i_r) * V + o_c[:, None] * (R * V) + o_v[None, :]
    tl.store(p_element, b_o.to(dtype), mask=m_row[:, None] & (o_v < V)[None, :])


@Launcher
@triton.jit(do_not_specialize=["T", "N"])
def delta_backward_scan_kernel(
    p_k, p_do, p_w, p_qe, p_cum, p_rk, p_total, p_route, p_start, p_end, p_offset,
    p_dfinal, p_ds, p_dinitial,
    T, N,
    s_k_b, s_k_t, s_k_h, s_do_b, s_do_t, s_do_h,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the state at the end (not the start) of every chunk: dS = e^{total} dS' − r Wᵀ k_e dS' + Qeᵀ dO."""
    i_v = tl.program_id(0)
    i_s, i_r = tl.program_id(1) // R, tl.program_id(1) % R
    i_b, _, i_n_first, i_n_end = _chunks_of(i_s, p_offset, N, VARLEN)
    EVEN_K: tl.constexpr = BK == K
    EVEN_V: tl.constexpr = V % BV == 0
    dtype = p_ds.dtype.element_ty
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    i_b64 = i_b.to(tl.int64)
    i_head = (i_b64 * R + i_r) * N
    p_k += i_b64 * s_k_b + i_r.to(tl.int64) * s_k_h
    p_do += i_b64 * s_do_b + i_r.to(tl.int64) * s_do_h
    m_state = (o_k < K)[:, None] & (o_v < V)[None, :]
    o_state = o_k[:, None] * V + o_v[None, :]
    b_ds = tl.zeros((BK, BV), tl.float32)
    o_sequence = (i_s.to(tl.int64) * R + i_r) * K * V
    if HAS_FINAL:
        b_ds = tl.load(p_dfinal + o_sequence + o_state, mask=m_state, other=0.0)
    for i_j in range(i_n_end - i_n_first):
        i_n = i_n_end - 1 - i_j  # later ones first
        i_start, i_end = _bounds(i_n, T, p_start, p_end, C, VARLEN)
        m_row = i_start + o_c < i_end
        i_place = (i_b64 * N + i_n) * R + i_r
        b_qe = _load_buffer(p_qe + i_place * C * K, o_c, o_k, K, EVEN_K)
        b_do = _load_tile(p_do + i_start.to(tl.int64) * s_do_t, o_c, s_do_t, o_v, m_row, V, EVEN_V)
        b_k = _load_tile(p_k + i_start.to(tl.int64) * s_k_t, o_c, s_k_t, o_k, m_row, K, EVEN_K)
        b_w = _load_buffer(p_w + i_place * C * K, o_c, o_k, K, EVEN_K)
        total = tl.load(p_total + i_head + i_n)
        r = tl.where(tl.load(p_route + i_place) < 0.5, 1.0, 0.0)
        b_end = tl.exp((total - tl.load(p_cum + i_place * C + o_c)).to(tl.float32))
        b_end = b_end * tl.load(p_rk + i_place * C + o_c) * r
        b_half = b_ds.to(dtype)
        tl.store(p_ds + i_place * K * V + o_state, b_half, mask=m_state)
        b_x = tl.dot(b_k, b_half, input_precision=PRECISION) * -b_end[:, None]
        b_ds = b_ds * tl.exp(total.to(tl.float32))
        b_ds += tl.dot(tl.trans(b_qe), b_do, input_precision=PRECISION)
        b_ds += tl.dot(tl.trans(b_w), b_x.to(dtype), input_precision=PRECISION)
    if HAS_INITIAL:
        tl.store(p_dinitial + o_sequence + o_state, b_ds, mask=m_state)


@Launcher
@triton.jit(do_not_specialize=["T", "N", "M"])
def delta_backward_kernel(
    p_k, p_v, p_o, p_do, p_beta, p_route, p_w, p_a, p_p, p_cum, p_rk, p_total,
    p_state, p_ds, p_slot, p_gap, p_start, p_end,
    p_vn, p_dvn, p_dp, p_da, p_dlast, p_doo, p_vdv, p_dqs, p_dw, p_dke, p_dv, p_droute,
    T, N, M,
    s_k_b, s_k_t, s_k_h, s_v_b, s_v_t, s_v_h, s_do_b, s_do_t, s_do_h,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    STAGE: tl.constexpr, RELOAD: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All products over the value columns in the gradients of one chunk and head, from the state S at its start and
    the gradient dS' of the state at its end: dv, dL/dr, dP = dO Vnᵀ, dA = dVn vᵀ, dO Sᵀ, dW = −dVn Sᵀ,
    dk_e = r Vn dS'ᵀ and, row by row, dO·O and Vn·dVn.

    STAGE 0 makes all of them in one pass. Where the sums do not fit registers, STAGE 1 makes those of the values and
    leaves Vn and dVn in memory, and STAGE 2 makes the three that are as wide as the keys from them, one after another.
    """
    i_n = tl.program_id(0)
    i_b, i_r = tl.program_id(1) // R, tl.program_id(1) % R
    i_start, i_end = _bounds(i_n, T, p_start, p_end, C, VARLEN)
    EVEN_K: tl.constexpr = BK == K
    EVEN_V: tl.constexpr = V % BV == 0
    dtype = p_dp.dtype.element_ty
    o_c, o_k = tl.arange(0, C), tl.arange(0, BK)
    m_row = i_start + o_c < i_end
    i_b64 = i_b.to(tl.int64)
    i_row = i_b64 * T + i_start
    i_place = (i_b64 * N + i_n) * R + i_r
    i_head = (i_b64 * R + i_r) * N
    i_slot = tl.load(p_slot + i_head + i_n)
    gap = tl.exp(tl.load(p_gap + i_head + i_n))
    r = tl.where(tl.load(p_route + i_place) < 0.5, 1.0, 0.0)
    p_state = p_state + (i_b64 * R + i_r) * M * K * V
    p_ds = p_ds + i_place * K * V
    p_do = p_do + i_b64 * s_do_b + i_start.to(tl.int64) * s_do_t + i_r.to(tl.int64) * s_do_h
    if STAGE < 2:
        total = tl.load(p_total + i_head + i_n)
        b_end = tl.exp((total - tl.load(p_cum + i_place * C + o_c)).to(tl.float32)) * tl.load(p_rk + i_place * C + o_c)
        b_beta = tl.load(p_beta + (i_row + o_c) * R + i_r, mask=m_row, other=0.0)
        p_k = p_k + i_b64 * s_k_b + i_start.to(tl.int64) * s_k_t + i_r.to(tl.int64) * s_k_h
        p_v = p_v + i_b64 * s_v_b + i_start.to(tl.int64) * s_v_t + i_r.to(tl.int64) * s_v_h
        if not RELOAD:
            b_k = _load_tile(p_k, o_c, s_k_t, o_k, m_row, K, EVEN_K)
            b_a = _load_buffer(p_a + i_place * C * C, o_c, o_c, C, True)
            b_w = _load_buffer(p_w + i_place * C * K, o_c, o_k, K, EVEN_K)
            b_p = _load_buffer(p_p + i_place * C * C, o_c, o_c, C, True)
        b_dp = tl.zeros((C, C), tl.float32)
        b_da = tl.zeros((C, C), tl.float32)
        b_dr = tl.zeros((C,), tl.float32)
        b_doo = tl.zeros((C,), tl.float32)
        b_vdv = tl.zeros((C,), tl.float32)
        b_dlast = tl.zeros((BK,), tl.float32)
        if STAGE == 0:
            b_dqs = tl.zeros((C, BK), tl.float32)
            b_dw = tl.zeros((C, BK), tl.float32)
            b_dke = tl.zeros((C, BK), tl.float32)
        for i_v in range(0, V, BV):
            o_v = i_v + tl.arange(0, BV)
            if RELOAD:  # kept through the loop they would not fit shared memory
                b_k = _load_tile(p_k, o_c, s_k_t, o_k, m_row, K, EVEN_K)
                b_a = _load_buffer(p_a + i_place * C * C, o_c, o_c, C, True)
                b_w = _load_buffer(p_w + i_place * C * K, o_c, o_k, K, EVEN_K)
                b_p = _load_buffer(p_p + i_place * C * C, o_c, o_c, C, True)
            b_s = _load_start(p_state, i_slot, o_k, o_v, K, V)
            b_ds = _load_state(p_ds, o_k, o_v, K, V, EVEN_K and EVEN_V)
            b_v = _load_tile(p_v, o_c, s_v_t, o_v, m_row, V, EVEN_V)
            b_do = _load_tile(p_do, o_c, s_do_t, o_v, m_row, V, EVEN_V)
            b_vn = tl.dot(b_a, (b_v * b_beta[:, None]).to(dtype), input_precision=PRECISION)
            b_vn -= tl.dot(b_w, b_s, input_precision=PRECISION) * gap
            b_x = tl.dot(b_k, b_ds, input_precision=PRECISION) * b_end[:, None]
            b_dr += tl.sum(b_vn * b_x, 1)
            b_dvn = tl.dot(tl.trans(b_p), b_do, input_precision=PRECISION) + r * b_x
            b_vdv += tl.sum(b_vn * b_dvn, 1)
            b_o = _load_tile(p_o + (i_row * R + i_r) * V, o_c, R * V, o_v, m_row, V, EVEN_V).to(tl.float32)
            b_doo += tl.sum(b_o * b_do.to(tl.float32), 1)
            b_dvn = b_dvn.to(dtype)
            b_dlast += tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32), 1)
            b_vn = b_vn.to(dtype)
            b_dp += tl.dot(b_do, tl.trans(b_vn), input_precision=PRECISION)
            b_da += tl.dot(b_dvn, tl.trans(b_v), input_precision=PRECISION)
            b_dv = tl.dot(tl.trans(b_a), b_dvn, input_precision=PRECISION) * b_beta[:, None]
            p_element = p_dv + (i_row * R + i_r) * V + o_c[:, None] * (R * V) + o_v[None, :]
            tl.store(p_element, b_dv.to(dtype), mask=m_row[:, None] & (o_v < V)[None, :])
            if STAGE == 0:
                b_dqs += tl.dot(b_do, tl.trans(b_s), input_precision=PRECISION)
                b_dw += tl.dot(b_dvn, tl.trans(b_s), input_precision=PRECISION)
                b_dke += tl.dot(b_vn, tl.trans(b_ds), input_precision=PRECISION)
            else:
                _store_buffer(p_vn + i_place * C * V, b_vn, o_c, o_v, V, EVEN_V)
                _store_buffer(p_dvn + i_place * C * V, b_dvn, o_c, o_v, V, EVEN_V)
        _store_buffer(p_dp + i_place * C * C, b_dp, o_c, o_c, C, True)
        _store_buffer(p_da + i_place * C * C, b_da, o_c, o_c, C, True)
        dr = tl.sum(b_dr, 0)
        tl.store(p_droute + i_place, -dr)
        tl.store(p_dlast + i_place, tl.sum(b_dlast, 0) * gap * tl.exp(total.to(tl.float32)) + r * dr)
        tl.store(p_doo + i_place * C + o_c, b_doo)
        tl.store(p_vdv + i_place * C + o_c, b_vdv)
        if STAGE == 0:
            _store_buffer(p_dqs + i_place * C * K, b_dqs * gap, o_c, o_k, K, EVEN_K)
            _store_buffer(p_dw + i_place * C * K, b_dw * -gap, o_c, o_k, K, EVEN_K)
            _store_buffer(p_dke + i_place * C * K, b_dke * r, o_c, o_k, K, EVEN_K)
    else:
        for part in tl.static_range(3):
            b_sum = tl.zeros((C, BK), tl.float32)
            for i_v in range(0, V, BV):
                o_v = i_v + tl.arange(0, BV)
                if part == 0:
                    b_value = _load_tile(p_do, o_c, s_do_t, o_v, m_row, V, EVEN_V)
                elif part == 1:
                    b_value = _load_buffer(p_dvn + i_place * C * V, o_c, o_v, V, EVEN_V)
                else:
                    b_value = _load_buffer(p_vn + i_place * C * V, o_c, o_v, V, EVEN_V)
                if part < 2:
                    b_state = _load_start(p_state, i_slot, o_k, o_v, K, V)
                else:
                    b_state = _load_state(p_ds, o_k, o_v, K, V, EVEN_K and EVEN_V)
                b_sum += tl.dot(b_value, tl.trans(b_state), input_precision=PRECISION)
            if part == 0:
                _store_buffer(p_dqs + i_place * C * K, b_sum * gap, o_c, o_k, K, EVEN_K)
            elif part == 1:
                _store_buffer(p_dw + i_place * C * K, b_sum * -gap, o_c, o_k, K, EVEN_K)
            else:
                _store_buffer(p_dke + i_place * C * K, b_sum * r, o_c, o_k, K, EVEN_K)


@Launcher
@triton.jit(do_not_specialize=["T", "N"])
def delta_backward_finish_kernel(
    p_q, p_k, p_g, p_beta, p_a, p_cum, p_rq, p_rk, p_total, p_start, p_end,
    p_dp, p_da, p_dlast, p_doo, p_vdv, p_dqs, p_dw, p_dke,
    p_dq, p_dk, p_dg, p_dbeta,
    T, N, scale,
    s_q_b, s_q_t, s_q_h, s_k_b, s_k_t, s_k_h,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    NORMALISE: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, dg and dbeta of one chunk and head from what ``delta_backward_kernel`` leaves.

    Two passes over the key columns, BK of them at a time. The first makes the products over all of them. The sums along
    rows that normalisation and decay need follow from these and two others: q̂·dq̂ = dO·O, and what k̂ gets through P and
    k_e makes Vn·dVn of k̂·dk̂ (the sums are exact in float32, where sums over rounded dq and dk were not).
    """
    i_n = tl.program_id(0)
    i_b, i_r = tl.program_id(1) // R, tl.program_id(1) % R
    i_start, i_end = _bounds(i_n, T, p_start, p_end, C, VARLEN)
    EVEN: tl.constexpr = K % BK == 0
    dtype = p_dq.dtype.element_ty
    o_c = tl.arange(0, C)
    m_row = i_start + o_c < i_end
    i_b64 = i_b.to(tl.int64)
    i_row = i_b64 * T + i_start
    i_place = (i_b64 * N + i_n) * R + i_r
    b_cum = tl.load(p_cum + i_place * C + o_c)
    b_rq = tl.load(p_rq + i_place * C + o_c)
    b_rk = tl.load(p_rk + i_place * C + o_c)
    b_beta = tl.load(p_beta + (i_row + o_c) * R + i_r, mask=m_row, other=0.0)
    total = tl.load(p_total + (i_b64 * R + i_r) * N + i_n)
    b_from_start = tl.exp(b_cum.to(tl.float32))
    b_weight = b_beta * b_from_start
    p_k = p_k + i_b64 * s_k_b + i_start.to(tl.int64) * s_k_t + i_r.to(tl.int64) * s_k_h
    p_q = p_q + i_b64 * s_q_b + i_start.to(tl.int64) * s_q_t + i_r.to(tl.int64) * s_q_h
    p_dw += i_place * C * K
    p_dke += i_place * C * K
    p_dqs += i_place * C * K

    b_kk = tl.zeros((C, C), tl.float32)
    b_dwk = tl.zeros((C, C), tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        b_k = _load_tile(p_k, o_c, s_k_t, o_k, m_row, K, EVEN)
        b_kk += tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
        b_dwk += tl.dot(_load_buffer(p_dw, o_c, o_k, K, EVEN), tl.trans(b_k), input_precision=PRECISION)

    # W = A diag(β e^G) k̂
    b_a = _load_buffer(p_a + i_place * C * C, o_c, o_c, C, True)
    b_along = tl.sum(b_a.to(tl.float32) * b_dwk, 0) * b_rk
    b_dbeta = b_from_start * b_along
    b_along = b_along * b_weight
    # A: dL = −Aᵀ dA Aᵀ below the diagonal
    b_da = _load_buffer(p_da + i_place * C * C, o_c, o_c, C, True).to(tl.float32)
    b_dbeta += tl.sum(b_a.to(tl.float32) * b_da, 0)
    b_da = b_da * b_beta[None, :] + b_dwk * (b_weight * b_rk)[None, :]
    b_da = tl.dot(b_da.to(dtype), tl.trans(b_a), input_precision=PRECISION)
    b_da = tl.dot(tl.trans(b_a), b_da.to(dtype), input_precision=PRECISION)
    b_decay = _decay(b_cum, C)
    b_dl = tl.where(o_c[:, None] > o_c[None, :], -b_da * b_decay, 0.0)
    b_cross = b_dl * b_kk * (b_rk[:, None] * b_rk[None, :])
    b_dbeta += tl.sum(b_cross, 1)
    b_cross = b_cross * b_beta[:, None]
    b_dl = b_dl * b_beta[:, None]
    b_rows, b_columns = tl.sum(b_cross, 1), tl.sum(b_cross, 0)
    b_dqn = tl.load(p_doo + i_place * C + o_c)  # q̂·dq̂
    b_vdv = tl.load(p_vdv + i_place * C + o_c)
    b_dcum = b_rows - b_columns + b_along + b_dqn - b_vdv
    b_dkn = b_rows + b_columns + b_along + b_vdv  # k̂·dk̂
    b_dp = _load_buffer(p_dp + i_place * C * C, o_c, o_c, C, True).to(tl.float32)
    b_score = b_dp * b_decay * scale  # gradient of q̂ k̂ᵀ
    b_score_q = (b_score * b_rk[None, :]).to(dtype)
    b_score_k = (b_score * b_rq[:, None]).to(dtype)
    b_dl_row = (b_dl * b_rk[None, :]).to(dtype)
    b_dl_column = (b_dl * b_rk[:, None]).to(dtype)

    o_scalar = (i_row + o_c) * R + i_r
    tl.store(p_dbeta + o_scalar, b_dbeta, mask=m_row)
    dlast = tl.load(p_dlast + i_place)
    b_dg = tl.cumsum(tl.where(o_c == C - 1, b_dcum + dlast, b_dcum), 0, reverse=True)
    b_g = tl.load(p_g + o_scalar, mask=m_row, other=0.0)
    tl.store(p_dg + o_scalar, tl.where(b_g < MIN_LOG_DECAY, 0.0, b_dg), mask=m_row)

    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = m_row[:, None] & (o_k < K)[None, :]
        o_tile = (i_row * R + i_r) * K + o_c[:, None] * (R * K) + o_k[None, :]
        b_k = _load_tile(p_k, o_c, s_k_t, o_k, m_row, K, EVEN)
        b_q = _load_tile(p_q, o_c, s_q_t, o_k, m_row, K, EVEN)
        b_dk = (
            tl.dot(tl.trans(b_a), _load_buffer(p_dw, o_c, o_k, K, EVEN), input_precision=PRECISION) * b_weight[:, None]
        )
        b_dk += tl.dot(b_dl_row, b_k, input_precision=PRECISION)
        b_dk += tl.dot(tl.trans(b_dl_column), b_k, input_precision=PRECISION)
        b_dk += tl.dot(tl.trans(b_score_k), b_q, input_precision=PRECISION)
        b_dk += _load_buffer(p_dke, o_c, o_k, K, EVEN).to(tl.float32) * tl.exp((total - b_cum).to(tl.float32))[:, None]
        b_dq = tl.dot(b_score_q, b_k, input_precision=PRECISION)
        b_dq += _load_buffer(p_dqs, o_c, o_k, K, EVEN).to(tl.float32) * (scale * b_from_start)[:, None]
        if NORMALISE:
            b_dk = (b_dk - b_k.to(tl.float32) * (b_rk * b_dkn)[:, None]) * b_rk[:, None]
            b_dq = (b_dq - b_q.to(tl.float32) * (b_rq * b_dqn)[:, None]) * b_rq[:, None]
        tl.store(p_dk + o_tile, b_dk.to(dtype), mask=m_k)
        tl.store(p_dq + o_tile, b_dq.to(dtype), mask=m_k)
