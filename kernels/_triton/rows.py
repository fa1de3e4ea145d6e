# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernel of ``rows_linear``: a few rows times a weight, bound by reading the weight once.

Shapes: M rows, K inputs, N outputs (with SwiGLU half the rows of the weight).
Names: p_ pointer, s_ stride, i_ index or bound, o_ offsets, b_ block in registers, m_ mask.

The norm before and what comes after the product are in the same kernel, as each launch of its own would take as long as
reading a megabyte of weights. The kernel may start while the one before it still runs (programmatic dependent launch):
it reads its part of the weight, which nothing writes, and then waits for what the other one computes.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from natsl.kernels.launch.launcher import Launcher
from natsl.kernels.launch.library import on_own_device


@cache
def dependent_launch(device: torch.device) -> bool:
    """Whether kernels may start before the one before them has ended: from compute capability 9 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that tiles of a program may take."""
    if device.type != "cuda":
        return 80 << 10
    most = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 << 10)
    return int(0.7 * most)


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until all that the kernels before have written can be read; then let the next one begin.

    So what a kernel reads before it waits may be anything that was complete before the kernel before it waited.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(p_first, COUNT: tl.constexpr, PDL: tl.constexpr):
    """Fetch COUNT consecutive elements, at most 16 KiB, from memory into the L2 cache, waiting for nothing."""
    if PDL:
        STEP: tl.constexpr = 128 * 8 // p_first.dtype.element_ty.primitive_bitwidth  # elements of a line
        p_line = p_first + tl.minimum(tl.arange(0, 128) * STEP, COUNT - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [p_line.to(tl.int64)], tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _inverse_rms(p_x, o_m, s_x, m_m, K, eps, BLOCK_K: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr):
    b_square = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for i in tl.static_range(BLOCKS):
        o_k = i * BLOCK_K + tl.arange(0, BLOCK_K)
        b_x = tl.load(p_x + o_m[:, None] * s_x + o_k[None, :], mask=m_m[:, None] & (o_k < K)[None, :], other=0.0)
        b_square += b_x.to(tl.float32) * b_x.to(tl.float32)
    return tl.rsqrt(tl.sum(b_square, 1) / K + eps)


@triton.jit
def _write_normed(p_x, p_norm, p_normed, K, eps, BLOCK_K: tl.constexpr, BLOCKS: tl.constexpr):
    b_square = tl.zeros((BLOCK_K,), tl.float32)
    for i in tl.static_range(BLOCKS):
        o_k = i * BLOCK_K + tl.arange(0, BLOCK_K)
        b_x = tl.load(p_x + o_k, mask=o_k < K, other=0.0).to(tl.float32)
        b_square += b_x * b_x
    scale = tl.rsqrt(tl.sum(b_square, 0) / K + eps)
    for i in tl.static_range(BLOCKS):
        o_k = i * BLOCK_K + tl.arange(0, BLOCK_K)
        b_x = tl.load(p_x + o_k, mask=o_k < K, other=0.0).to(tl.float32)
        b_x *= scale * tl.load(p_norm + o_k, mask=o_k < K, other=0.0).to(tl.float32)
        tl.store(p_normed + o_k, b_x.to(p_normed.dtype.element_ty), mask=o_k < K)


@triton.jit
def _load_weight(p_w, o_n, o_k, m_n, K, BLOCK_K: tl.constexpr, EVEN: tl.constexpr):
    p_tile = p_w + o_n.to(tl.int64)[:, None] * K + o_k[None, :]
    if EVEN:
        b_w = tl.load(p_tile, mask=m_n[:, None], other=0.0)
    else:
        b_w = tl.load(p_tile, mask=m_n[:, None] & (o_k < K)[None, :], other=0.0)
    return b_w


@Launcher
@triton.jit(do_not_specialize=["M", "N"])
def rows_linear_kernel(
    p_x, p_w, p_norm, p_residual, p_y, p_normed,
    eps, M, N, K,
    s_x, s_residual,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCKS: tl.constexpr, EVEN: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr, WRITE: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y [M,N] for BLOCK_N of the N outputs; x [M,K], w [N or 2N,K], norm [K], residual [M,N]; BLOCKS · BLOCK_K ≥ K.

    WRITE: further programs, one per row, write normed [M,K].
    """
    o_m = tl.arange(0, BLOCK_M)
    m_m = o_m < M
    i_writer = tl.program_id(0) - (N + BLOCK_N - 1) // BLOCK_N
    if WRITE and i_writer >= 0:
        wait_for_previous(PDL)
        _write_normed(p_x + i_writer * s_x, p_norm, p_normed + i_writer * K, K, eps, BLOCK_K, BLOCKS)
    else:
        o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        o_k = tl.arange(0, BLOCK_K)
        dtype = p_x.dtype.element_ty
        b_w = _load_weight(p_w, o_n, o_k, m_n, K, BLOCK_K, EVEN)
        if GATED:
            b_u = _load_weight(p_w, o_n + N, o_k, m_n, K, BLOCK_K, EVEN)
        wait_for_previous(PDL)
        if BLOCK_M == 1:
            b_sum = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            b_up = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            b_square = tl.zeros((BLOCK_K,), tl.float32)
            for i in tl.static_range(BLOCKS):
                o_k = i * BLOCK_K + tl.arange(0, BLOCK_K)
                b_x = tl.load(p_x + o_k, mask=o_k < K, other=0.0).to(tl.float32)
                if NORM:
                    b_square += b_x * b_x
                    b_x *= tl.load(p_norm + o_k, mask=o_k < K, other=0.0).to(tl.float32)
                if i > 0:
                    b_w = _load_weight(p_w, o_n, o_k, m_n, K, BLOCK_K, EVEN)
                b_sum += b_w.to(tl.float32) * b_x[None, :]
                if GATED:
                    if i > 0:
                        b_u = _load_weight(p_w, o_n + N, o_k, m_n, K, BLOCK_K, EVEN)
                    b_up += b_u.to(tl.float32) * b_x[None, :]
            b_y = tl.sum(b_sum, 1)[None, :]
            b_gate = tl.sum(b_up, 1)[None, :]
            if NORM:
                scale = tl.rsqrt(tl.sum(b_square, 0) / K + eps)
                b_y *= scale
                b_gate *= scale
        else:
            b_y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            b_gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            if NORM:
                b_scale = _inverse_rms(p_x, o_m, s_x, m_m, K, eps, BLOCK_K, BLOCKS, BLOCK_M)
            for i in tl.static_range(BLOCKS):
                o_k = i * BLOCK_K + tl.arange(0, BLOCK_K)
                m_x = m_m[:, None] & (o_k < K)[None, :]
                b_x = tl.load(p_x + o_m[:, None] * s_x + o_k[None, :], mask=m_x, other=0.0)
                if NORM:
                    b_weight = tl.load(p_norm + o_k, mask=o_k < K, other=0.0).to(tl.float32)
                    b_x = (b_x.to(tl.float32) * b_scale[:, None] * b_weight[None, :]).to(dtype)
                if i > 0:
                    b_w = _load_weight(p_w, o_n, o_k, m_n, K, BLOCK_K, EVEN)
                b_y = tl.dot(b_x, tl.trans(b_w), b_y, input_precision=PRECISION)
                if GATED:
                    if i > 0:
                        b_u = _load_weight(p_w, o_n + N, o_k, m_n, K, BLOCK_K, EVEN)
                    b_gate = tl.dot(b_x, tl.trans(b_u), b_gate, input_precision=PRECISION)
        if GATED:
            b_y = b_y * tl.sigmoid(b_y) * b_gate
        m_y = m_m[:, None] & m_n[None, :]
        if ADD:
            b_y += tl.load(p_residual + o_m[:, None] * s_residual + o_n[None, :], mask=m_y, other=0.0).to(tl.float32)
        tl.store(p_y + o_m[:, None] * N + o_n[None, :], b_y.to(dtype), mask=m_y)


def blocks(M: int, K: int, N: int, gated: bool, size: int, memory: int) -> tuple[int, int, int]:
    """Outputs and inputs that a program takes at once, and its warps: the fastest on an H100.

    ``size``: bytes of an element; ``memory``: of shared memory that products of several rows may take.
    """
    most, parts = triton.next_power_of_2(K), 2 if gated else 1
    if M == 1:
        columns = max(16, min(most, 2048))
        return 8, columns, 8 if columns * parts > 1024 else 4
    wide = N >= 2048
    rows, columns = (32 if wide else 16), (2048 if not wide else 256 if gated else 512)
    columns = max(16, min(most, columns))
    while columns > 16 and (max(16, triton.next_power_of_2(M)) + rows * parts) * columns * size > memory:
        columns //= 2
    return rows, columns, 4 if wide and not gated else 8


@on_own_device
def rows_linear(
    x: Tensor, weight: Tensor, norm: Tensor | None, eps: float, gated: bool, residual: Tensor | None, want_normed: bool
) -> tuple[Tensor, Tensor]:
    """Product of few rows on Triton; arguments as in ``natsl.kernels.rows.rows_linear``, x with unit column stride."""
    (M, K), N = x.shape, weight.shape[0] // (2 if gated else 1)
    y = x.new_empty(M, N)
    normed = x.new_empty(M, K) if want_normed else x
    block_m = 1 if M == 1 else max(16, triton.next_power_of_2(M))
    pdl = dependent_launch(x.device)
    rows, columns, warps = blocks(M, K, N, gated, x.element_size(), _shared_memory(x.device))
    writers = M if want_normed else 0
    rows_linear_kernel[(triton.cdiv(N, rows) + writers,)](
        x, weight, x if norm is None else norm, x if residual is None else residual, y, normed,
        eps, M, N, K,
        x.stride(0), 0 if residual is None else residual.stride(0),
        BLOCK_M=block_m, BLOCK_N=rows, BLOCK_K=columns, BLOCKS=triton.cdiv(K, columns), EVEN=K % columns == 0,
        NORM=norm is not None, GATED=gated, ADD=residual is not None, WRITE=want_normed,
        PRECISION="tf32x3" if x.dtype == torch.float32 else "ieee", PDL=pdl,
        num_warps=warps, launch_pdl=pdl,
    )  # fmt: skip
    return y, normed
