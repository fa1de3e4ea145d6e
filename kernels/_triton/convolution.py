# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernel of ``continued_convolution``.

Shapes: B batch, T new tokens, W width of the convolution.
Names: p_ pointer, s_ stride, i_ index or bound, o_ offsets, b_ block in registers, m_ mask.
Bound by memory: what the taps share is in the first cache when the second of them reads it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from natsl.kernels.launch.launcher import Launcher
from natsl.kernels.launch.library import on_own_device

BLOCK_T, BLOCK_C = 16, 128  # the fastest of fifteen on an H100


@Launcher
@triton.jit(do_not_specialize=["T"])
def convolution_kernel(
    p_x, p_weight, p_tail, p_count, p_y, p_after,
    T, s_x_b, s_x_t,
    CHANNELS: tl.constexpr, W: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """y [B,T,CHANNELS] of BLOCK_T tokens and BLOCK_C channels; those of the first tokens write the tail after the call.

    x [B,T,CHANNELS], weight [CHANNELS,W], tail and after [B,W − 1,CHANNELS]; count [B] int64 if PADDED.
    """
    i_t = tl.program_id(0)
    i_b = tl.program_id(2).to(tl.int64)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < CHANNELS
    p_x += i_b * s_x_b
    p_tail += i_b * (W - 1) * CHANNELS
    b_y = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for i_tap in tl.static_range(W):
        o_s = o_t + i_tap - (W - 1)
        m_new = (o_s >= 0) & (o_t < T)
        b_x = tl.load(p_x + o_s.to(tl.int64)[:, None] * s_x_t + o_c, mask=m_new[:, None] & m_c, other=0.0)
        b_x = b_x.to(tl.float32)
        if i_t == 0:
            m_old = (o_s < 0) & (o_t < T)  # one of the two is 0
            b_x += tl.load(p_tail + (o_s + W - 1)[:, None] * CHANNELS + o_c, mask=m_old[:, None] & m_c, other=0.0)
        b_y += b_x * tl.load(p_weight + o_c * W + i_tap, mask=m_c, other=0.0).to(tl.float32)
    p_out = p_y + (i_b * T + o_t)[:, None] * CHANNELS + o_c
    tl.store(p_out, (b_y * tl.sigmoid(b_y)).to(p_y.dtype.element_ty), mask=(o_t < T)[:, None] & m_c)
    if i_t == 0:
        i_count = tl.load(p_count + i_b) if PADDED else T
        for i_old in tl.static_range(W - 1):
            i_s = i_count + i_old - (W - 1)
            n_new = tl.where(i_s >= 0, CHANNELS, 0)  # channels that come from x, the others from the tail
            b_last = tl.load(p_x + i_s.to(tl.int64) * s_x_t + o_c, mask=o_c < n_new, other=0.0)
            b_last += tl.load(p_tail + (i_s + W - 1) * CHANNELS + o_c, mask=m_c & (o_c >= n_new), other=0.0)
            tl.store(p_after + (i_b * (W - 1) + i_old) * CHANNELS + o_c, b_last, mask=m_c)


@on_own_device
def convolve(x: Tensor, weight: Tensor, tail: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Arguments as in ``natsl.kernels.convolution.continued_convolution``, which checks them; contiguous but for x."""
    B, T, channels = x.shape
    y, after = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(tail)
    convolution_kernel[(triton.cdiv(T, BLOCK_T), triton.cdiv(channels, BLOCK_C), B)](
        x, weight, tail, tail if lengths is None else lengths.contiguous(), y, after,
        T, *x.stride()[:2],
        CHANNELS=channels, W=weight.shape[1], BLOCK_T=BLOCK_T, BLOCK_C=BLOCK_C, PADDED=lengths is not None, num_warps=4,
    )  # fmt: skip
    return y, after
