# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernels of ``routed_mix``, of its form for one memory, ``gated_norm``, and of ``rms_norm``.

Shapes: B batch, T tokens, Hs softmax heads, Vs value width; a row is one (b, t, head). With s = sigmoid(gate),
n = RMS(o) and (w0, w1) = softmax(logits), a row gives y = gate·s·m with m = w0·γ0·n0 + w1·γ1·n1. Backward, with
u = dy·gate·s and p_i = ⟨u, γ_i n_i⟩: dgate = dy·m·s(1 + gate(1 − s)), dlogit_0 = −dlogit_1 = w0·w1·(p_0 − p_1),
do_i = w_i (γ_i u − n_i p_i / Vs) / rms_i, dγ_i = Σ over the rows of w_i u n_i.
Names: p_ pointer, s_ stride, i_ index or bound, n_ count, o_ offsets, b_ block in registers, m_ mask.
Bound by memory: every tensor is read and written once, and the norms are computed again in the backward pass.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from natsl.kernels.dispatch import last_contiguous
from natsl.kernels.launch.launcher import Launcher
from natsl.kernels.launch.library import on_own_device, register
from natsl.kernels.launch.parameters import pick
from natsl.kernels.launch.replay import Replayed


@triton.jit
def _row_offsets(o_row, T, Hs: tl.constexpr, s_x_b, s_x_t, s_x_h):
    """Offsets of the rows (b, t, head) of a strided tensor, in 64 bits."""
    o_token = o_row // Hs
    return (o_token // T).to(tl.int64) * s_x_b + (o_token % T).to(tl.int64) * s_x_t + (o_row % Hs).to(tl.int64) * s_x_h


@triton.jit
def _load_rows(p_x, o_row, o_v, m_tile, T, Hs: tl.constexpr, s_x_b, s_x_t, s_x_h):
    """The rows of a strided tensor in float32, zeros where not ``m_tile``."""
    o_element = _row_offsets(o_row, T, Hs, s_x_b, s_x_t, s_x_h)[:, None] + o_v[None, :]
    return tl.load(p_x + o_element, mask=m_tile, other=0.0).to(tl.float32)


@triton.jit
def _load_log_odds(p_logit, o_row, m_row, T, Hs: tl.constexpr, s_x_b, s_x_t, s_x_h):
    """Logit 0 − logit 1 of every row, the log odds of the first memory, in float32."""
    o_logit = _row_offsets(o_row, T, Hs, s_x_b, s_x_t, s_x_h)
    b_logit = tl.load(p_logit + o_logit, mask=m_row, other=0.0).to(tl.float32)
    return b_logit - tl.load(p_logit + o_logit + 1, mask=m_row, other=0.0).to(tl.float32)


@triton.jit
def _normalise(b_x, m_row, eps, Vs: tl.constexpr):
    """RMS(x) and 1 / rms of rows that are 0 past Vs; rows past the end stay finite at eps = 0 too."""
    b_rstd = tl.rsqrt(tl.where(m_row, tl.sum(b_x * b_x, 1) * (1.0 / Vs) + eps, 1.0))
    return b_x * b_rstd[:, None], b_rstd


@Launcher
@triton.jit(do_not_specialize=["rows", "T"])
def mix_forward_kernel(
    p_o_delta, p_o_softmax, p_gate, p_logit, p_weight_delta, p_weight_softmax, p_y,
    eps, rows, T,
    s_o_delta_b, s_o_delta_t, s_o_delta_h, s_o_softmax_b, s_o_softmax_t, s_o_softmax_h,
    s_gate_b, s_gate_t, s_gate_h, s_logit_b, s_logit_t, s_logit_h,
    Hs: tl.constexpr, Vs: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_ROWS: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """y of BLOCK_ROWS rows, contiguous.

    o_delta, o_softmax, gate, y [B,T,Hs,Vs], logits [B,T,Hs,2], weights [Vs]. Not BOTH: o_delta is the output of the
    only memory, and what belongs to the other is not read.
    """
    o_row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_v = tl.arange(0, BLOCK_V)
    m_row = o_row < rows
    m_tile = m_row[:, None] & (o_v < Vs)[None, :]
    b_o_delta = _load_rows(p_o_delta, o_row, o_v, m_tile, T, Hs, s_o_delta_b, s_o_delta_t, s_o_delta_h)
    b_gate = _load_rows(p_gate, o_row, o_v, m_tile, T, Hs, s_gate_b, s_gate_t, s_gate_h)
    b_weight_delta = tl.load(p_weight_delta + o_v, mask=o_v < Vs, other=0.0).to(tl.float32)[None, :]
    if BOTH:  # every load before the first sum, so that all are under way at once
        b_o_softmax = _load_rows(p_o_softmax, o_row, o_v, m_tile, T, Hs, s_o_softmax_b, s_o_softmax_t, s_o_softmax_h)
        b_logit = _load_log_odds(p_logit, o_row, m_row, T, Hs, s_logit_b, s_logit_t, s_logit_h)
        b_weight_softmax = tl.load(p_weight_softmax + o_v, mask=o_v < Vs, other=0.0).to(tl.float32)[None, :]
    b_normed, _ = _normalise(b_o_delta, m_row, eps, Vs)
    b_mixed = b_normed * b_weight_delta
    if BOTH:
        b_normed, _ = _normalise(b_o_softmax, m_row, eps, Vs)
        b_mixed = b_mixed * tl.sigmoid(b_logit)[:, None] + b_normed * b_weight_softmax * tl.sigmoid(-b_logit)[:, None]
    b_y = b_gate * tl.sigmoid(b_gate) * b_mixed
    tl.store(p_y + o_row.to(tl.int64)[:, None] * Vs + o_v[None, :], b_y.to(p_y.dtype.element_ty), mask=m_tile)


@Launcher
@triton.jit(do_not_specialize=["rows", "T"])
def mix_backward_kernel(
    p_dy, p_o_delta, p_o_softmax, p_gate, p_logit, p_weight_delta, p_weight_softmax,
    p_do_delta, p_do_softmax, p_dgate, p_dlogit, p_dweight_delta, p_dweight_softmax,
    eps, rows, T,
    s_dy_b, s_dy_t, s_dy_h, s_o_delta_b, s_o_delta_t, s_o_delta_h, s_o_softmax_b, s_o_softmax_t, s_o_softmax_h,
    s_gate_b, s_gate_t, s_gate_h, s_logit_b, s_logit_t, s_logit_h,
    Hs: tl.constexpr, Vs: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_ROWS: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """Gradients, contiguous, of all inputs of the forward kernel; of the weights, shares [programs,Vs] float32.

    A program takes every programs-th block of rows and keeps its shares of the weights' gradients in registers.
    """
    i_program = tl.program_id(0)
    n_programs = tl.num_programs(0)
    o_v = tl.arange(0, BLOCK_V)
    b_weight_delta = tl.load(p_weight_delta + o_v, mask=o_v < Vs, other=0.0).to(tl.float32)[None, :]
    b_weight_softmax = tl.load(p_weight_softmax + o_v, mask=o_v < Vs, other=0.0).to(tl.float32)[None, :]
    b_dweight_delta = tl.zeros((BLOCK_ROWS, BLOCK_V), tl.float32)
    b_dweight_softmax = tl.zeros((BLOCK_ROWS, BLOCK_V), tl.float32)
    for i_block in range(i_program, tl.cdiv(rows, BLOCK_ROWS), n_programs):
        o_row = i_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        m_row = o_row < rows
        m_tile = m_row[:, None] & (o_v < Vs)[None, :]
        o_out = o_row.to(tl.int64)[:, None] * Vs + o_v[None, :]
        b_dy = _load_rows(p_dy, o_row, o_v, m_tile, T, Hs, s_dy_b, s_dy_t, s_dy_h)
        b_o_delta = _load_rows(p_o_delta, o_row, o_v, m_tile, T, Hs, s_o_delta_b, s_o_delta_t, s_o_delta_h)
        b_gate = _load_rows(p_gate, o_row, o_v, m_tile, T, Hs, s_gate_b, s_gate_t, s_gate_h)
        if BOTH:  # every load before the first sum, so that all are under way at once
            b_o_softmax = _load_rows(
                p_o_softmax, o_row, o_v, m_tile, T, Hs, s_o_softmax_b, s_o_softmax_t, s_o_softmax_h
            )
            b_logit = _load_log_odds(p_logit, o_row, m_row, T, Hs, s_logit_b, s_logit_t, s_logit_h)
        b_sigmoid = tl.sigmoid(b_gate)
        b_u = b_dy * b_gate * b_sigmoid
        b_normed, b_rstd = _normalise(b_o_delta, m_row, eps, Vs)
        b_product = b_u * b_normed
        b_p = tl.sum(b_product * b_weight_delta, 1)
        b_do_delta = (b_u * b_weight_delta - b_normed * (b_p * (1.0 / Vs))[:, None]) * b_rstd[:, None]
        b_mixed = b_normed * b_weight_delta
        if BOTH:
            b_w0 = tl.sigmoid(b_logit)
            b_w1 = tl.sigmoid(-b_logit)
            b_do_delta *= b_w0[:, None]
            b_product *= b_w0[:, None]
            b_normed, b_rstd = _normalise(b_o_softmax, m_row, eps, Vs)
            b_other = b_u * b_normed
            b_q = tl.sum(b_other * b_weight_softmax, 1)
            b_do_softmax = (b_u * b_weight_softmax - b_normed * (b_q * (1.0 / Vs))[:, None]) * (b_rstd * b_w1)[:, None]
            b_mixed = b_mixed * b_w0[:, None] + b_normed * b_weight_softmax * b_w1[:, None]
            b_dweight_softmax += b_other * b_w1[:, None]
            tl.store(p_do_softmax + o_out, b_do_softmax.to(p_do_softmax.dtype.element_ty), mask=m_tile)
            b_dlogit = b_w0 * b_w1 * (b_p - b_q)
            o_dlogit = o_row.to(tl.int64) * 2
            tl.store(p_dlogit + o_dlogit, b_dlogit.to(p_dlogit.dtype.element_ty), mask=m_row)
            tl.store(p_dlogit + o_dlogit + 1, (-b_dlogit).to(p_dlogit.dtype.element_ty), mask=m_row)
        b_dweight_delta += b_product
        b_dgate = b_dy * b_mixed * b_sigmoid * (1.0 + b_gate * (1.0 - b_sigmoid))
        tl.store(p_do_delta + o_out, b_do_delta.to(p_do_delta.dtype.element_ty), mask=m_tile)
        tl.store(p_dgate + o_out, b_dgate.to(p_dgate.dtype.element_ty), mask=m_tile)
    o_share = i_program.to(tl.int64) * Vs + o_v
    tl.store(p_dweight_delta + o_share, tl.sum(b_dweight_delta, 0), mask=o_v < Vs)
    if BOTH:
        tl.store(p_dweight_softmax + o_share, tl.sum(b_dweight_softmax, 0), mask=o_v < Vs)


@Launcher
@triton.jit(do_not_specialize=["rows", "T"])
def mix_norm_kernel(
    p_x, p_weight, p_y,
    eps, rows, T, s_x_b, s_x_t, s_x_h,
    Hs: tl.constexpr, Vs: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """weight · RMS(x) of BLOCK_ROWS rows of x [B,T,Hs,Vs], weight [Vs], contiguous."""
    o_row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_v = tl.arange(0, BLOCK_V)
    m_row = o_row < rows
    m_tile = m_row[:, None] & (o_v < Vs)[None, :]
    b_x = _load_rows(p_x, o_row, o_v, m_tile, T, Hs, s_x_b, s_x_t, s_x_h)
    b_weight = tl.load(p_weight + o_v, mask=o_v < Vs, other=0.0).to(tl.float32)[None, :]
    b_normed, _ = _normalise(b_x, m_row, eps, Vs)
    b_y = (b_normed * b_weight).to(p_y.dtype.element_ty)
    tl.store(p_y + o_row.to(tl.int64)[:, None] * Vs + o_v[None, :], b_y, mask=m_tile)


class _Second(NamedTuple):
    """What belongs to the second memory."""

    o: Tensor  # [B,T,Hs,Vs]
    logits: Tensor  # [B,T,Hs,2]
    weight: Tensor  # [Vs]


def check_rows(op: str, x: Tensor) -> None:
    """Raise ``ValueError`` where x [B,T,Hs,Vs] has more rows than the kernels count."""
    if x.shape[:3].numel() >= 2**31 - 2**16:
        raise ValueError(f"{op}: the triton backend takes less than 2^31 - 2^16 rows, found {x.shape[:3].numel()}")


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _like(inputs: list[Tensor]) -> list[Tensor]:
    """Contiguous tensors of the same shapes, whatever the strides."""
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]


def _parameters(kernel: str, x: Tensor, both: bool, elements: int) -> dict[str, int]:
    """Launch parameters; by default a program holds at most ``elements`` elements of each tensor at once."""
    width = triton.next_power_of_2(x.shape[3])
    default = {"BLOCK_ROWS": max(1, min(64, elements // width)), "num_warps": 4, "PROGRAMS": 4}
    key = f"{str(x.dtype).removeprefix('torch.')} V{x.shape[3]} {'both' if both else 'one'}"
    return pick(kernel, key, x.device, default)


def _row_major(x: Tensor, gate: Tensor, weight: Tensor, second: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, _Second]:
    """The inputs as the kernels read them; without a second memory those of the first stand in for its own."""
    x, gate, weight = last_contiguous(x), last_contiguous(gate), weight.contiguous()
    if not second:
        return x, gate, weight, _Second(x, gate, weight)
    o, logits, weight_softmax = second
    return x, gate, weight, _Second(last_contiguous(o), last_contiguous(logits), weight_softmax.contiguous())


@Replayed
def _forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float, second: list[Tensor]) -> Tensor:
    """y; ``second``: the tensors of ``_Second``, or none."""
    (y,) = _like([x])
    if y.numel() == 0:
        return y
    B, T, Hs, Vs = y.shape
    launch = _parameters("mix_forward", y, bool(second), 2048)
    x, gate, weight, other = _row_major(x, gate, weight, second)
    mix_forward_kernel[(triton.cdiv(B * T * Hs, launch["BLOCK_ROWS"]),)](
        x, other.o, gate, other.logits, weight, other.weight, y,
        eps, B * T * Hs, T,
        *x.stride()[:3], *other.o.stride()[:3], *gate.stride()[:3], *other.logits.stride()[:3],
        Hs=Hs, Vs=Vs, BLOCK_V=triton.next_power_of_2(Vs), BLOCK_ROWS=launch["BLOCK_ROWS"], BOTH=bool(second),
        num_warps=launch["num_warps"],
    )  # fmt: skip
    return y


@Replayed
def _launch_backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, second: list[Tensor]
) -> list[Tensor]:
    """Gradients of x and gate, of the second memory's output and the logits if there is one, and every program's share
    of those of the weights, [1 or 2, programs, Vs] float32."""
    dx, dgate = grads = _like([x, gate])
    B, T, Hs, Vs = x.shape
    launch = _parameters("mix_backward", x, bool(second), 1024)
    dy = last_contiguous(dy)
    x, gate, weight, other = _row_major(x, gate, weight, second)
    do_softmax, dlogits = dx, dgate  # not written
    if second:
        do_softmax, dlogits = grads_softmax = _like([other.o, other.logits])
        grads = [*grads, *grads_softmax]
    blocks = triton.cdiv(B * T * Hs, launch["BLOCK_ROWS"])
    programs = min(blocks, launch["PROGRAMS"] * _multiprocessors(dy.device))
    shares = torch.empty(1 + bool(second), programs, Vs, dtype=torch.float32, device=dy.device)
    mix_backward_kernel[(programs,)](
        dy, x, other.o, gate, other.logits, weight, other.weight,
        dx, do_softmax, dgate, dlogits, shares[0], shares[-1],
        eps, B * T * Hs, T,
        *dy.stride()[:3], *x.stride()[:3], *other.o.stride()[:3], *gate.stride()[:3], *other.logits.stride()[:3],
        Hs=Hs, Vs=Vs, BLOCK_V=triton.next_power_of_2(Vs), BLOCK_ROWS=launch["BLOCK_ROWS"], BOTH=bool(second),
        num_warps=launch["num_warps"],
    )  # fmt: skip
    return [*grads, shares]


def _backward(dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, second: list[Tensor]) -> list[Tensor]:
    """Gradients of x, gate and weight, then those of ``second``."""
    if x.numel() == 0:
        return [tensor.zero_() for tensor in _like([x, gate, weight, *second])]
    dx, dgate, *dsecond, shares = _launch_backward(dy, x, gate, weight, eps, second)
    dweight, *dweight_softmax = [share.sum(0) for share in shares]  # in a fixed order
    grads = [dx, dgate, dweight.to(weight.dtype), *dsecond]
    if second:
        grads += [total.to(_Second(*second).weight.dtype) for total in dweight_softmax]
    return grads


# both ops take the first memory's output x, gate, weight, eps and the tensors of ``_Second`` or none
_INPUTS = "Tensor x, Tensor gate, Tensor weight, float eps, Tensor[] second"
_forward_op = register("mix", f"({_INPUTS}) -> Tensor", _forward, lambda x, gate, weight, eps, second: _like([x])[0])
_backward_op = register(
    "mix_backward",
    f"(Tensor dy, {_INPUTS}) -> Tensor[]",
    _backward,
    lambda dy, x, gate, weight, eps, second: _like([x, gate, weight, *second]),
)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, eps: float, x: Tensor, gate: Tensor, weight: Tensor, *second: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate, weight, *second)  # the norms are computed again in the backward pass
        ctx.eps = eps
        y: Tensor = _forward_op(x, gate, weight, eps, list(second))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight, *second = ctx.saved_tensors
        return (None, *_backward_op(grads[0], x, gate, weight, ctx.eps, second))


def routed_mix(
    o_delta: Tensor,
    o_softmax: Tensor,
    gate: Tensor,
    mix_logits: Tensor,
    weight_delta: Tensor,
    weight_softmax: Tensor,
    eps: float,
) -> Tensor:
    """The combination of both branches; arguments as in ``natsl.kernels.mix.routed_mix``, which checks them."""
    check_rows("routed_mix", o_delta)
    second = (o_softmax, mix_logits, weight_softmax)
    y: Tensor = _Mix.apply(eps, o_delta, gate, weight_delta, *second)  # type: ignore[no-untyped-call]
    return y


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The output of a single memory; arguments as in ``natsl.kernels.mix.gated_norm``, which checks them."""
    check_rows("gated_norm", x)
    y: Tensor = _Mix.apply(eps, x, gate, weight)  # type: ignore[no-untyped-call]
    return y


@on_own_device
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of the rows of x [B,T,Hs,Vs], not empty; arguments as in ``natsl.kernels.mix.rms_norm``."""
    B, T, Hs, Vs = x.shape
    check_rows("rms_norm", x)
    y, width = torch.empty(x.shape, dtype=x.dtype, device=x.device), triton.next_power_of_2(Vs)
    rows = max(1, min(64, 4096 // width))
    mix_norm_kernel[(triton.cdiv(B * T * Hs, rows),)](
        x, weight.contiguous(), y,
        eps, B * T * Hs, T, *x.stride()[:3],
        Hs=Hs, Vs=Vs, BLOCK_V=width, BLOCK_ROWS=rows, num_warps=4 if width <= 4096 else 8,
    )  # fmt: skip
    return y
