# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernels of ``decode_step``: what a layer does with one new token of every sequence, in three launches.

Shapes: B batch, C chunk size, R routing heads, G softmax heads per routing head, Hs = R·G, Ks and Vs key and value
width of a softmax head, K = G·Ks, V = G·Vs, W width of the convolution, M places of a head in the table of pages.
Names: p_ pointer, s_ stride, i_ index or bound, n_ count, o_ offsets, b_ block in registers, m_ mask.

*prepare*, four programs per row and routing head: convolution, norms, rotation, gates, weights of the mix, the new key
and value in their page, and at the end of a chunk its route. *memories*: the pages of all heads of all rows as one
list, which PROGRAMS programs share out in equal consecutive parts, so that the time depends on how many are kept and
not on which head keeps them; further programs take tiles of the delta rule's states and shift what the next token
reads. *mix*, a program per softmax head: joins the parts of a head, norms and weighs both memories, and moves on to a
new page. Nothing depends on the host: lengths, pages and routes are read on the device. Bound by memory: a key and a
value are read once, in products that no matrix unit is needed for.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from natsl.kernels._triton.rows import dependent_launch, prefetch, wait_for_previous
from natsl.kernels.launch.launcher import Launcher
from natsl.kernels.launch.library import on_own_device

if TYPE_CHECKING:
    from natsl.kernels.decode import DecodePolicy, DecodeState, DecodeWeights

PER_MULTIPROCESSOR, WARPS = 2, 8  # programs of softmax: so many of them fit on one at once
LOWEST = tl.constexpr(-1e30)  # below every score; −inf less −inf would be no number


@triton.jit
def _convolved(p_new, p_tail, p_conv, o_channel, m_channel, CHANNELS: tl.constexpr, W: tl.constexpr):
    """SiLU of the short convolution at the new token, in float32 after rounding to the dtype of the inputs."""
    b_x = tl.load(p_new + o_channel, mask=m_channel, other=0.0).to(tl.float32)
    b_y = b_x * tl.load(p_conv + o_channel * W + W - 1, mask=m_channel, other=0.0).to(tl.float32)
    for i_tap in tl.static_range(W - 1):
        b_x = tl.load(p_tail + i_tap * CHANNELS + o_channel, mask=m_channel, other=0.0).to(tl.float32)
        b_y += b_x * tl.load(p_conv + o_channel * W + i_tap, mask=m_channel, other=0.0).to(tl.float32)
    return (b_y * tl.sigmoid(b_y)).to(p_new.dtype.element_ty).to(tl.float32)


@triton.jit
def _rotated(b_x, b_pair, o_k, n_read, p_rotation, Ks: tl.constexpr):
    """Rotary embedding at position ``n_read`` of x, given what is half a width away from every element."""
    b_angle = n_read.to(tl.float32) * tl.load(p_rotation + o_k % (Ks // 2))
    return b_x * tl.cos(b_angle) + tl.where(o_k < Ks // 2, -b_pair, b_pair) * tl.sin(b_angle)


@triton.jit
def _softmax_head(
    p_new, p_tail, p_conv, p_norm, p_rotation, o_head, o_k, m_k, i_first, n_read, eps,
    CHANNELS: tl.constexpr, Ks: tl.constexpr, W: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """Queries or keys of softmax heads [G,Ks], normed and at their position, in float32.

    Returned twice: rounded to the dtype of the inputs, and what the convolution gave.
    """
    b_x = _convolved(p_new, p_tail, p_conv, i_first + o_head * Ks + o_k, m_k, CHANNELS, W)
    b_scale = tl.rsqrt(tl.sum(b_x * b_x, 1) / Ks + eps)[:, None]
    b_y = b_x * b_scale * tl.load(p_norm + o_k, mask=o_k < Ks, other=0.0).to(tl.float32)
    if ROPE:
        o_pair = tl.where(o_k < Ks // 2, o_k + Ks // 2, o_k - Ks // 2)
        b_pair = _convolved(p_new, p_tail, p_conv, i_first + o_head * Ks + o_pair, m_k, CHANNELS, W) * b_scale
        b_pair *= tl.load(p_norm + o_pair, mask=o_k < Ks, other=0.0).to(tl.float32)
        dtype = p_new.dtype.element_ty
        b_y = _rotated(b_y.to(dtype).to(tl.float32), b_pair.to(dtype).to(tl.float32), o_k, n_read, p_rotation, Ks)
    return b_y.to(p_new.dtype.element_ty).to(tl.float32), b_x


@Launcher
@triton.jit(do_not_specialize=["M"])
def decode_prepare_kernel(
    p_x, p_inputs, p_tail, p_total, p_decay, p_keys, p_values, p_table, p_kept, p_read, p_live,
    p_conv, p_query_norm, p_key_norm, p_rotation, p_rate, p_gate_bias, p_mix, p_mix_bias, p_count_bias,
    p_router, p_router_bias,
    p_threshold, p_cap, p_burst, p_temperature, p_delta_only,
    p_active, p_query, p_gate, p_logit, p_route,
    eps, M, width,
    s_inputs_b,
    R: tl.constexpr, G: tl.constexpr, Ks: tl.constexpr, Vs: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr,
    SOFTMAX: tl.constexpr, DELTA: tl.constexpr, ROPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Everything of the new token before the memories; programs for q, k, v and the router of each routing head.

    inputs [B,·]: q, k, v before the convolution, the output's gate, and what the delta rule's two gates are made of.
    x [B,width], tail [B,W−1,·], total [B,width], decay [B,R], keys [P,G,C,Ks], values [P,G,C,Vs], table [B,R,M], kept
    [B,R], read and live [B], conv [·,W], norms [Ks], rate [R], gate_bias [2,R], mix [Hs·2,R·K] and its biases, router
    [R,width] and its bias [R] (of a margin), policy [B,R] and [B]. Writes active [B,·] (q, k, v after the convolution),
    query [B,Hs,Ks] float32, gate [B,R,3] (log decay, write strength, decay since the border), logit [B,Hs,2], route
    [B,R] int32: 1 where a chunk ends that is kept.
    """
    i_row = tl.program_id(0)
    i_b = i_row // R
    i_r = i_row % R
    i_part = tl.program_id(1)
    KEYS: tl.constexpr = R * G * Ks
    CHANNELS: tl.constexpr = 2 * KEYS + R * G * Vs
    if i_part < 2:
        prefetch(p_conv + (i_part * KEYS + i_r * G * Ks) * W, G * Ks * W, PDL)
    elif i_part == 2:
        prefetch(p_conv + (2 * KEYS + i_r * G * Vs) * W, G * Vs * W, PDL)
    elif SOFTMAX and DELTA:
        prefetch(p_conv, KEYS * W, PDL)
        prefetch(p_mix + i_r * 2 * G * KEYS, 2 * G * KEYS, PDL)
    wait_for_previous(PDL)
    n_read = tl.load(p_read + i_b)
    i_slot = n_read % C
    live = tl.load(p_live + i_b) != 0
    ends = live & (i_slot == C - 1)
    p_inputs += i_b.to(tl.int64) * s_inputs_b
    p_tail += i_b.to(tl.int64) * ((W - 1) * CHANNELS)
    p_active += i_b.to(tl.int64) * CHANNELS
    o_g = tl.arange(0, BLOCK_G)[:, None]
    o_k = tl.arange(0, BLOCK_K)[None, :]
    o_v = tl.arange(0, BLOCK_V)[None, :]
    o_head = i_r * G + o_g
    m_k = (o_g < G) & (o_k < Ks)
    m_v = (o_g < G) & (o_v < Vs)

    dtype = p_inputs.dtype.element_ty
    o_row = i_row.to(tl.int64)
    m_live = o_g < tl.where(live, G, 0)
    if i_part == 0:  # queries
        if SOFTMAX:
            b_query, b_q = _softmax_head(
                p_inputs, p_tail, p_conv, p_query_norm, p_rotation, o_head, o_k, m_k, 0, n_read, eps,
                CHANNELS, Ks, W, ROPE,
            )  # fmt: skip
            tl.store(p_query + (i_b.to(tl.int64) * R * G + o_head) * Ks + o_k, b_query, mask=m_k)
        else:
            b_q = _convolved(p_inputs, p_tail, p_conv, o_head * Ks + o_k, m_k, CHANNELS, W)
        if DELTA:
            tl.store(p_active + o_head * Ks + o_k, b_q.to(dtype), mask=m_k)
    elif i_part == 1:  # keys
        if SOFTMAX:
            n_kept = tl.load(p_kept + i_row)
            b_key, b_k = _softmax_head(
                p_inputs, p_tail, p_conv, p_key_norm, p_rotation, o_head, o_k, m_k, KEYS, n_read, eps,
                CHANNELS, Ks, W, ROPE,
            )  # fmt: skip
            o_place = (tl.load(p_table + o_row * M + n_kept) * G + o_g) * C + i_slot
            tl.store(p_keys + o_place * Ks + o_k, b_key.to(p_keys.dtype.element_ty), mask=m_k & m_live)
        else:
            b_k = _convolved(p_inputs, p_tail, p_conv, KEYS + o_head * Ks + o_k, m_k, CHANNELS, W)
        if DELTA:
            tl.store(p_active + KEYS + o_head * Ks + o_k, b_k.to(dtype), mask=m_k)
    elif i_part == 2:  # values, and the delta rule's gates
        if SOFTMAX:
            n_kept = tl.load(p_kept + i_row)
        b_v = _convolved(p_inputs, p_tail, p_conv, 2 * KEYS + o_head * Vs + o_v, m_v, CHANNELS, W)
        if SOFTMAX:
            o_place = (tl.load(p_table + o_row * M + n_kept) * G + o_g) * C + i_slot
            tl.store(p_values + o_place * Vs + o_v, b_v.to(p_values.dtype.element_ty), mask=m_v & m_live)
        if DELTA:
            tl.store(p_active + 2 * KEYS + o_head * Vs + o_v, b_v.to(dtype), mask=m_v)
            p_raw = p_inputs + CHANNELS + R * G * Vs + i_r
            a = tl.load(p_raw).to(tl.float32) + tl.load(p_gate_bias + i_r)
            # softplus; log(1 + e) of a small e is e, what rounding leaves of it divided out
            e = tl.exp(-tl.abs(a))
            above = 1.0 + e
            softplus = tl.maximum(a, 0.0) + tl.where(above == 1.0, e, tl.log(above) * e / tl.maximum(above - 1.0, 1e-9))
            log_decay = -tl.load(p_rate + i_r) * softplus
            strength = tl.sigmoid(tl.load(p_raw + R).to(tl.float32) + tl.load(p_gate_bias + R + i_r))
            decay = tl.load(p_decay + i_row) + log_decay
            tl.store(p_gate + i_row * 3, log_decay)
            tl.store(p_gate + i_row * 3 + 1, strength)
            tl.store(p_gate + i_row * 3 + 2, decay)
            if live:
                tl.store(p_decay + i_row, tl.where(ends, 0.0, decay))
    elif SOFTMAX:  # weights of the mix, and the route
        n_kept = tl.load(p_kept + i_row)
        keeps = ends
        if DELTA:
            # the weights of a head's mix depend on the queries of all heads
            o_weight = tl.arange(0, 2 * BLOCK_G)
            m_weight = o_weight < 2 * G
            o_weight += i_r * 2 * G
            b_logit = tl.load(p_mix_bias + o_weight, mask=m_weight, other=0.0).to(tl.float32)
            b_count = tl.load(p_count_bias + o_weight, mask=m_weight, other=0.0).to(tl.float32)
            b_logit += b_count / (1 + n_kept).to(tl.float32)
            for i_block in range(0, KEYS, BLOCK):
                o_c = i_block + tl.arange(0, BLOCK)
                b_x = _convolved(p_inputs, p_tail, p_conv, o_c, o_c < KEYS, CHANNELS, W)
                o_mix = o_weight[:, None] * KEYS + o_c[None, :]
                m_mix = m_weight[:, None] & (o_c < KEYS)[None, :]
                b_logit += tl.sum(tl.load(p_mix + o_mix, mask=m_mix, other=0.0).to(tl.float32) * b_x[None, :], 1)
            b_logit /= tl.load(p_temperature + i_b)
            only_delta = tl.load(p_delta_only + i_b) != 0
            b_logit = tl.where((o_weight % 2 == 1) & only_delta, float("-inf"), b_logit)
            tl.store(p_logit + i_b.to(tl.int64) * (2 * R * G) + o_weight, b_logit, mask=m_weight)
            if ends:
                margin = tl.load(p_router_bias + i_r).to(tl.float32)
                for i_block in range(0, width, BLOCK):
                    o_d = i_block + tl.arange(0, BLOCK)
                    b_sum = tl.load(p_total + i_b.to(tl.int64) * width + o_d, mask=o_d < width, other=0.0)
                    b_x = tl.load(p_x + i_b.to(tl.int64) * width + o_d, mask=o_d < width, other=0.0)
                    b_mean = ((b_sum + b_x.to(tl.float32)).to(dtype).to(tl.float32) / C).to(dtype).to(tl.float32)
                    b_router = tl.load(p_router + i_r * width + o_d, mask=o_d < width, other=0.0)
                    margin += tl.sum(b_mean * b_router, 0)
                # 1e-9 keeps a product such as 0.07·100 = 7.000000000000001 from rounding up to the next integer
                n_most = tl.ceil(tl.load(p_cap + i_b) * (n_read // C + 1).to(tl.float64) - 1e-9).to(tl.int64)
                keeps = (margin > tl.load(p_threshold + i_row)) & (n_kept < n_most + tl.load(p_burst + i_b))
        tl.store(p_route + i_row, keeps.to(tl.int32))


@triton.jit
def _load_page(
    p_keys, p_values, i_page, i_j, n_slots, o_c,
    G: tl.constexpr, Ks: tl.constexpr, Vs: tl.constexpr, C: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Keys [C,BLOCK_K] and values [C,BLOCK_V] of the j-th softmax head in the first ``n_slots`` slots of a page."""
    o_k = tl.arange(0, BLOCK_K)
    o_v = tl.arange(0, BLOCK_V)
    o_token = ((i_page * G + i_j) * C + o_c)[:, None]
    m_c = (o_c < n_slots)[:, None]
    b_k = tl.load(p_keys + o_token * Ks + o_k, mask=m_c & (o_k < Ks), other=0.0)
    b_v = tl.load(p_values + o_token * Vs + o_v, mask=m_c & (o_v < Vs), other=0.0)
    return b_k, b_v


@triton.jit
def _pages_of(
    p_table, p_read, o_all, b_end, b_pages, i_head, m_head, M, R: tl.constexpr, G: tl.constexpr, C: tl.constexpr
):
    """Of a softmax head: where its pages end in the list of all, its table from the list's start on, the open slot."""
    i_end = tl.sum(tl.where(o_all == i_head, b_end, 0), 0)
    i_first = i_end - tl.sum(tl.where(o_all == i_head, b_pages, 0), 0)
    i_row = i_head // G
    i_slot = (tl.load(p_read + i_row // R, mask=m_head, other=0) % C).to(tl.int32)
    return i_end, p_table + (i_row.to(tl.int64) * M - i_first), i_slot


@triton.jit
def _attend(
    i_program, p_query, p_keys, p_values, p_table, p_kept, p_read, p_end, p_peak, p_sum, scale, M, n_heads,
    R: tl.constexpr, G: tl.constexpr, Ks: tl.constexpr, Vs: tl.constexpr, C: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, HEADS: tl.constexpr, PROGRAMS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The share of one program in the pages of all heads, each page of a softmax head by itself.

    What it finds for a head goes to place program + head: from one to the next at least one of the two is larger. Each
    page is read while the one before it is computed with, and the first one before the new keys are there.
    """
    o_all = tl.arange(0, HEADS)
    m_all = o_all < n_heads
    b_pages = (tl.load(p_kept + o_all // G, mask=m_all, other=-1) + 1).to(tl.int32)
    b_end = tl.cumsum(b_pages, 0)
    n_all = tl.sum(b_pages, 0)
    n_share = (n_all + PROGRAMS - 1) // PROGRAMS
    i_page = i_program * n_share
    i_last = tl.minimum(i_page + n_share, n_all)
    i_head = tl.sum((b_end <= i_page).to(tl.int32), 0)
    o_c = tl.arange(0, C)
    o_k = tl.arange(0, BLOCK_K)
    o_v = tl.arange(0, BLOCK_V)
    i_end, p_list, i_slot = _pages_of(p_table, p_read, o_all, b_end, b_pages, i_head, i_page < i_last, M, R, G, C)
    is_open = i_page + 1 == i_end
    n_page = tl.load(p_list + i_page, mask=i_page < i_last, other=0)
    n_slots = tl.where(i_page < i_last, tl.where(is_open, i_slot, C), 0)
    b_k, b_v = _load_page(p_keys, p_values, n_page, i_head % G, n_slots, o_c, G, Ks, Vs, C, BLOCK_K, BLOCK_V)
    wait_for_previous(PDL)
    if i_program == 0:
        tl.store(p_end + o_all, b_end, mask=m_all)
    if is_open & (i_page < i_last):  # the new token itself
        o_token = (n_page * G + i_head % G) * C + o_c
        m_c = (o_c == i_slot)[:, None]
        b_k += tl.load(p_keys + o_token[:, None] * Ks + o_k, mask=m_c & (o_k < Ks), other=0.0)
        b_v += tl.load(p_values + o_token[:, None] * Vs + o_v, mask=m_c & (o_v < Vs), other=0.0)
    while i_page < i_last:
        i_stop = tl.minimum(i_last, i_end)
        b_q = tl.load(p_query + i_head.to(tl.int64) * Ks + o_k, mask=o_k < Ks, other=0.0) * scale
        # a running softmax in every place of the chunk by itself: nothing has to be joined before the last page
        b_peak = tl.full((C,), LOWEST, tl.float32)
        b_total = tl.zeros((C,), tl.float32)
        b_sum = tl.zeros((C, BLOCK_V), tl.float32)
        n_page = tl.load(p_list + i_page + 1, mask=i_page + 1 < i_stop, other=0)
        for i in range(i_page, i_stop):
            m_c = o_c <= tl.where(i + 1 < i_end, C - 1, i_slot)  # the last one is open
            b_score = tl.where(m_c, tl.sum(b_k.to(tl.float32) * b_q[None, :], 1), float("-inf"))
            b_above = tl.maximum(b_peak, b_score)
            b_weight = tl.exp(b_score - b_above)
            b_rest = tl.exp(b_peak - b_above)
            b_total = b_total * b_rest + b_weight
            b_sum = b_sum * b_rest[:, None] + b_weight[:, None] * b_v.to(tl.float32)
            b_peak = b_above
            n_slots = tl.where(i + 1 < i_stop, tl.where(i + 2 == i_end, i_slot + 1, C), 0)
            b_k, b_v = _load_page(p_keys, p_values, n_page, i_head % G, n_slots, o_c, G, Ks, Vs, C, BLOCK_K, BLOCK_V)
            n_page = tl.load(p_list + i + 2, mask=i + 2 < i_stop, other=0)
        peak = tl.max(b_peak, 0)
        b_share = tl.exp(b_peak - peak)
        i_part = (i_program + i_head).to(tl.int64)
        tl.store(p_peak + i_part * 2, peak)
        tl.store(p_peak + i_part * 2 + 1, tl.sum(b_total * b_share, 0))
        tl.store(p_sum + i_part * Vs + o_v, tl.sum(b_sum * b_share[:, None], 0), mask=o_v < Vs)
        i_page = i_stop
        i_head += 1
        if i_page < i_last:
            i_end, p_list, i_slot = _pages_of(p_table, p_read, o_all, b_end, b_pages, i_head, True, M, R, G, C)
            n_page = tl.load(p_list + i_page)
            n_slots = tl.where(i_page + 1 == i_end, i_slot + 1, C)
            b_k, b_v = _load_page(p_keys, p_values, n_page, i_head % G, n_slots, o_c, G, Ks, Vs, C, BLOCK_K, BLOCK_V)


@triton.jit
def _step_delta(
    i_program, p_active, p_gate, p_route, p_read, p_live, p_border, p_working, p_o_delta, scale,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr, TILES: tl.constexpr, SOFTMAX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The delta rule's token in a tile of one state [K,BLOCK_DV], and its state at the end of a chunk."""
    i_row = i_program // TILES
    i_r = i_row % R
    o_k = tl.arange(0, BLOCK_DK)
    o_v = (i_program % TILES) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    m_k = o_k < K
    m_v = o_v < V
    m_tile = m_k[:, None] & m_v[None, :]
    o_tile = i_row.to(tl.int64) * (K * V) + o_k[:, None] * V + o_v[None, :]
    p_active += (i_row // R).to(tl.int64) * (R * (2 * K + V))
    b_h = tl.load(p_working + o_tile, mask=m_tile, other=0.0)
    wait_for_previous(PDL)
    b_q = tl.load(p_active + i_r * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_k = tl.load(p_active + (R + i_r) * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_v = tl.load(p_active + 2 * R * K + i_r * V + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_q *= tl.rsqrt(tl.sum(b_q * b_q, 0) + 1e-6) * scale
    b_k *= tl.rsqrt(tl.sum(b_k * b_k, 0) + 1e-6)
    b_h *= tl.exp(tl.load(p_gate + i_row * 3))
    b_error = tl.load(p_gate + i_row * 3 + 1) * (b_v - tl.sum(b_k[:, None] * b_h, 0))
    b_h += b_k[:, None] * b_error[None, :]
    tl.store(p_o_delta + i_row.to(tl.int64) * V + o_v, tl.sum(b_q[:, None] * b_h, 0), mask=m_v)
    m_tile = m_tile & (o_k < tl.where(tl.load(p_live + i_row // R) != 0, K, 0))[:, None]
    if tl.load(p_read + i_row // R) % C == C - 1:
        if SOFTMAX:
            b_border = tl.load(p_border + o_tile, mask=m_tile, other=0.0) * tl.exp(tl.load(p_gate + i_row * 3 + 2))
            b_h = tl.where(tl.load(p_route + i_row) > 0, b_border, b_h)
        tl.store(p_border + o_tile, b_h, mask=m_tile)
    tl.store(p_working + o_tile, b_h, mask=m_tile)


@triton.jit
def _shift(
    i_program, p_x, p_inputs, p_tail, p_total, p_start, p_read, p_live, width, s_inputs_b,
    CHANNELS: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    SOFTMAX: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """What the next token reads of the inputs: the convolution's tail, the router's sum, the place in the chunk."""
    i_b = (i_program // PARTS).to(tl.int64)
    o_c = (i_program % PARTS) * BLOCK + tl.arange(0, BLOCK)
    live = tl.load(p_live + i_b) != 0
    m_c = o_c < tl.where(live, CHANNELS, 0)
    p_tail += i_b * ((W - 1) * CHANNELS)
    for i_tap in tl.static_range(W - 2):
        tl.store(p_tail + i_tap * CHANNELS + o_c, tl.load(p_tail + (i_tap + 1) * CHANNELS + o_c, mask=m_c), mask=m_c)
    if W > 1:
        b_x = tl.load(p_inputs + i_b * s_inputs_b + o_c, mask=m_c)
        tl.store(p_tail + (W - 2) * CHANNELS + o_c, b_x.to(p_tail.dtype.element_ty), mask=m_c)
    i_slot = tl.load(p_read + i_b) % C
    if SOFTMAX and DELTA:
        o_d = i_b * width + o_c
        b_sum = tl.load(p_total + o_d, mask=o_c < width, other=0.0)
        b_sum += tl.load(p_x + o_d, mask=o_c < width, other=0.0).to(tl.float32)
        tl.store(p_total + o_d, tl.where(i_slot == C - 1, 0.0, b_sum), mask=o_c < tl.where(live, width, 0))
    starts = live & (i_program % PARTS == 0)
    if DELTA and starts:
        tl.store(p_start + i_b, (i_slot + 1) % C)


@Launcher
@triton.jit(do_not_specialize=["M", "rows"])
def decode_memories_kernel(
    p_x, p_inputs, p_active, p_query, p_gate, p_route, p_keys, p_values, p_table, p_kept, p_read, p_live,
    p_tail, p_total, p_border, p_working, p_start,
    p_end, p_peak, p_sum, p_o_delta,
    scale_softmax, scale_delta, M, rows, width,
    s_inputs_b,
    R: tl.constexpr, G: tl.constexpr, Ks: tl.constexpr, Vs: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, HEADS: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    SOFTMAX: tl.constexpr, DELTA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Both memories at the new token, and what the next one reads; rows = B·R.

    First PROGRAMS programs of softmax, then TILES for each state, then PARTS for each sequence. Arguments as in the
    kernel before; border, working [B,R,K,V], start [B]. Writes end [B·Hs] int32, the pages of the heads up to each one;
    of every part of a head peak [·,2] (highest score, sum of weights) and sum [·,Vs]; o_delta [B,R,V]: all float32.
    """
    i_program = tl.program_id(0)
    if i_program < PROGRAMS:
        if SOFTMAX:
            _attend(
                i_program, p_query, p_keys, p_values, p_table, p_kept, p_read, p_end, p_peak, p_sum,
                scale_softmax, M, rows * G, R, G, Ks, Vs, C, BLOCK_K, BLOCK_V, HEADS, PROGRAMS, PDL,
            )  # fmt: skip
    elif i_program < PROGRAMS + rows * TILES:
        if DELTA:
            _step_delta(
                i_program - PROGRAMS, p_active, p_gate, p_route, p_read, p_live, p_border, p_working, p_o_delta,
                scale_delta, R, G * Ks, G * Vs, C, BLOCK_DK, BLOCK_DV, TILES, SOFTMAX, PDL,
            )  # fmt: skip
    else:
        wait_for_previous(PDL)
        _shift(
            i_program - PROGRAMS - rows * TILES, p_x, p_inputs, p_tail, p_total, p_start, p_read, p_live,
            width, s_inputs_b, R * G * (2 * Ks + Vs), W, C, BLOCK, PARTS, SOFTMAX, DELTA,
        )  # fmt: skip


@triton.jit
def _normed(b_x, p_weight, o_v, m_v, eps, Vs: tl.constexpr):
    b_weight = tl.load(p_weight + o_v, mask=m_v, other=0.0).to(tl.float32)
    return b_x * tl.rsqrt(tl.sum(b_x * b_x, 0) / Vs + eps) * b_weight


@Launcher
@triton.jit(do_not_specialize=["M", "rows", "pages"])
def decode_mix_kernel(
    p_inputs, p_end, p_peak, p_sum, p_o_delta, p_logit, p_delta_norm, p_softmax_norm, p_route, p_kept, p_table, p_y,
    eps, M, rows, pages,
    s_inputs_b,
    R: tl.constexpr, G: tl.constexpr, Ks: tl.constexpr, Vs: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_PARTS: tl.constexpr, PROGRAMS: tl.constexpr, ROWS: tl.constexpr,
    SOFTMAX: tl.constexpr, DELTA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [B,Hs,Vs] of the memories, a program per softmax head of a row; rows = B·R.

    The first head of each routing head counts a chunk that ended and is kept, and takes the next free page.
    """
    i_head = tl.program_id(0)
    o_v = tl.arange(0, BLOCK_V)
    m_v = o_v < Vs
    CHANNELS: tl.constexpr = R * G * (2 * Ks + Vs)
    i_b = (i_head // (R * G)).to(tl.int64)
    b_gate = tl.load(p_inputs + i_b * s_inputs_b + CHANNELS + (i_head % (R * G)) * Vs + o_v, mask=m_v, other=0.0)
    b_gate = b_gate.to(tl.float32)
    b_mixed = tl.zeros((BLOCK_V,), tl.float32)
    odds = 0.0
    if DELTA and SOFTMAX:
        odds = tl.load(p_logit + i_head.to(tl.int64) * 2) - tl.load(p_logit + i_head.to(tl.int64) * 2 + 1)
    wait_for_previous(PDL)
    if DELTA:
        b_o = tl.load(p_o_delta + i_head.to(tl.int64) * Vs + o_v, mask=m_v, other=0.0)
        b_mixed = _normed(b_o, p_delta_norm, o_v, m_v, eps, Vs)
    if SOFTMAX:
        n_all = tl.load(p_end + rows * G - 1)
        n_share = (n_all + PROGRAMS - 1) // PROGRAMS
        i_first = tl.load(p_end + i_head - 1, mask=i_head > 0, other=0) // n_share
        i_last = (tl.load(p_end + i_head) - 1) // n_share
        peak = tl.full((), float("-inf"), tl.float32)
        weight = tl.zeros((), tl.float32)
        b_sum = tl.zeros((BLOCK_V,), tl.float32)
        for i_part in range(i_first, i_last + 1, BLOCK_PARTS):
            o_part = i_part + tl.arange(0, BLOCK_PARTS)
            m_part = o_part <= i_last
            o_part = (o_part + i_head).to(tl.int64)
            b_peak = tl.load(p_peak + o_part * 2, mask=m_part, other=float("-inf"))
            b_weight = tl.load(p_peak + o_part * 2 + 1, mask=m_part, other=0.0)
            b_part = tl.load(p_sum + o_part[:, None] * Vs + o_v, mask=m_part[:, None] & m_v[None, :], other=0.0)
            above = tl.maximum(peak, tl.max(b_peak, 0))
            b_share = tl.exp(b_peak - above)
            rest = tl.exp(peak - above)
            weight = weight * rest + tl.sum(b_share * b_weight, 0)
            b_sum = b_sum * rest + tl.sum(b_share[:, None] * b_part, 0)
            peak = above
        b_softmax = _normed(b_sum / weight, p_softmax_norm, o_v, m_v, eps, Vs)
        if DELTA:
            b_mixed = b_mixed * tl.sigmoid(odds) + b_softmax * tl.sigmoid(-odds)
        else:
            b_mixed = b_softmax
        i_row = i_head // G
        if (i_head % G == 0) & (tl.load(p_route + i_row) > 0):
            o_row = tl.arange(0, ROWS)
            i_page = 1 + n_all // G + tl.sum(tl.load(p_route + o_row, mask=o_row < i_row, other=0), 0)
            n_kept = tl.load(p_kept + i_row) + 1
            if (n_kept < M) & (i_page < pages):  # the caller sees to it: this keeps a mistake from other pages
                tl.store(p_kept + i_row, n_kept)
                tl.store(p_table + i_row.to(tl.int64) * M + n_kept, i_page.to(tl.int64))
    b_y = b_gate * tl.sigmoid(b_gate) * b_mixed
    tl.store(p_y + i_head.to(tl.int64) * Vs + o_v, b_y.to(p_y.dtype.element_ty), mask=m_v)


class Sizes(NamedTuple):
    """Sizes of a layer; Ks and Vs are those of a softmax head."""

    R: int
    G: int
    Ks: int
    Vs: int
    W: int
    C: int


@cache
def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 5  # of the interpreter, one after another
    return PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


@on_own_device
def launch(
    x: Tensor,
    inputs: Tensor,
    weights: DecodeWeights,
    state: DecodeState,
    policy: DecodePolicy,
    sizes: Sizes,
    eps: float,
) -> Tensor:
    """The three launches; arguments as in ``natsl.kernels.decode.decode_step``, which checks them."""
    (B, width), (R, G, Ks, Vs, W, C) = x.shape, sizes
    delta, pages = state.delta, state.pages
    softmax, heads, rows = pages is not None, B * R * G, B * R
    programs = _programs(x.device) if softmax else 0

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    def there(tensor: Tensor | None) -> Tensor:  # what is not there is not read
        return x if tensor is None else tensor

    channels = R * G * (2 * Ks + Vs)
    active = scratch(B, channels, dtype=inputs.dtype)
    query, gate, logit = scratch(B, R * G, Ks), scratch(B, R, 3), scratch(B, R * G, 2)
    route, end = scratch(B, R, dtype=torch.int32), scratch(heads, dtype=torch.int32)
    parts = programs + heads - 1 if softmax else 1
    peak, total, o_delta = scratch(parts, 2), scratch(parts, Vs), scratch(B, R, G * Vs)
    y = scratch(B, R * G * Vs, dtype=inputs.dtype)
    memory = (x,) * 4 if pages is None else pages
    border, working, decay, start = (x,) * 4 if delta is None else delta
    M, n_pages = (1, 1) if pages is None else (pages.table.shape[2], pages.keys.shape[0])
    names: dict[str, int] = {"R": R, "G": G, "Ks": Ks, "Vs": Vs}
    pdl = dependent_launch(x.device)
    kinds = {"SOFTMAX": softmax, "DELTA": delta is not None, "PDL": pdl, "launch_pdl": pdl}
    block_k, block_v = triton.next_power_of_2(Ks), triton.next_power_of_2(Vs)
    decode_prepare_kernel[(rows, 4 if softmax else 3)](
        x, inputs, state.tail, there(state.total), decay, *memory, state.read, state.live,
        weights.conv, there(weights.query_norm), there(weights.key_norm), there(weights.rotation), there(weights.rate),
        there(weights.gate_bias), there(weights.mix), there(weights.mix_bias), there(weights.count_bias),
        there(weights.router), there(weights.router_bias),
        policy.threshold, policy.cap, policy.burst, policy.temperature, policy.delta_only,
        active, query, gate, logit, route,
        eps, M, width,
        inputs.stride(0),
        **names, W=W, C=C, BLOCK_G=triton.next_power_of_2(G), BLOCK_K=block_k, BLOCK_V=block_v, BLOCK=1024,
        **kinds, ROPE=weights.rotation is not None, num_warps=4,
    )  # fmt: skip
    tiles, parts_of_row = triton.cdiv(G * Vs, 32) if delta is not None else 0, triton.cdiv(max(channels, width), 1024)
    decode_memories_kernel[(programs + rows * tiles + B * parts_of_row,)](
        x, inputs, active, query, gate, route, *memory, state.read, state.live,
        state.tail, there(state.total), border, working, start,
        end, peak, total, o_delta,
        Ks**-0.5, (G * Ks) ** -0.5, M, rows, width,
        inputs.stride(0),
        **names, W=W, C=C, BLOCK_K=block_k, BLOCK_V=block_v, HEADS=triton.next_power_of_2(heads), PROGRAMS=programs,
        BLOCK_DK=triton.next_power_of_2(G * Ks), BLOCK_DV=32, TILES=tiles, BLOCK=1024,
        PARTS=parts_of_row, **kinds, num_warps=WARPS, maxnreg=min(255, 65536 // (32 * WARPS * PER_MULTIPROCESSOR)),
    )  # fmt: skip
    decode_mix_kernel[(heads,)](
        inputs, end, peak, total, o_delta, logit, there(weights.delta_norm), there(weights.softmax_norm), route,
        memory[3], memory[2], y,
        eps, M, rows, n_pages,
        inputs.stride(0),
        **names, BLOCK_V=block_v, BLOCK_PARTS=64, PROGRAMS=programs, ROWS=triton.next_power_of_2(rows), **kinds,
        num_warps=4,
    )  # fmt: skip
    return y
