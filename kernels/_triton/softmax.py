"""The softmax branch on Triton: launches of the kernels in ``softmax_kernels`` and the ops around them.

Shapes: B batch, T tokens, C chunk size, N chunks, R routing heads, Hs key heads, Hq query heads, J = Hq/Hs query heads
per key head, G = Hs/R key heads per routing head, Ks key width, Vs value width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from natsl.kernels._triton.routing import first_chunks, kept_chunks, packed_blocks
from natsl.kernels._triton.softmax_kernels import (
    softmax_counterfactual_kernel,
    softmax_dkv_kernel,
    softmax_dq_kernel,
    softmax_forward_kernel,
)
from natsl.kernels.dispatch import last_contiguous
from natsl.kernels.launch import parameters
from natsl.kernels.launch.library import register
from natsl.kernels.launch.replay import Replayed
from natsl.kernels.reference import MAX_EXPONENT, sampling_weight

LOG2E = math.log2(math.e)


class SoftmaxInputs(NamedTuple):
    """What the branch reads; q, k, v of one dtype, route of 0 and 1."""

    q: Tensor  # [B,T,Hq,Ks]
    k: Tensor  # [B,T,Hs,Ks]
    v: Tensor  # [B,T,Hs,Vs]
    route: Tensor  # [B,N,R]


class SoftmaxOutputs(NamedTuple):
    """The output and what the backward pass needs; ``softmax_kernels`` explains the last three."""

    o: Tensor  # [B,T,Hq,Vs]
    lse: Tensor  # [B,Hq,≥T] float32
    starts: Tensor  # [B,R,N] int32
    counts: Tensor  # [B,R,N+1] int32


class SoftmaxOptions(NamedTuple):
    """How the branch is computed."""

    chunk_size: int
    scale: float
    counterfactual: str = "none"  # these two matter in the backward pass only
    want_route: bool = False


def _tiles(
    cu_seqlens: Tensor | None, chunk_size: int, size: int, tokens: int, placeholder: Tensor
) -> tuple[int, list[Tensor]]:
    """Number of tiles of ``size`` tokens, and the pointers that say where each begins (``placeholder`` if nothing is
    packed): cu_seqlens, the first chunk of every sequence, the sequence of every tile and its start inside it."""
    if cu_seqlens is None:
        return -(-tokens // size), [placeholder] * 4
    count = tokens // size + cu_seqlens.shape[0] - 1
    offsets = cu_seqlens.to(torch.int32).contiguous()
    return count, [offsets, first_chunks(cu_seqlens, chunk_size), *packed_blocks(cu_seqlens, size, count)]


def _constants(x: SoftmaxInputs, chunk_size: int, cu_seqlens: Tensor | None) -> dict[str, Any]:
    """The constants that all kernels take."""
    return dict(shape_constants(x.q.dtype, x.q.shape[3], x.v.shape[3], chunk_size), VARLEN=cu_seqlens is not None)


@cache
def shape_constants(dtype: torch.dtype, Ks: int, Vs: int, chunk_size: int) -> dict[str, Any]:
    """The constants that depend on the shape of a head."""
    return {
        "Ks": Ks,
        "Vs": Vs,
        "BLOCK_K": max(16, triton.next_power_of_2(Ks)),
        "BLOCK_V": max(16, triton.next_power_of_2(Vs)),
        "C": chunk_size,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "ieee",
    }


def _blocks(kernel: str, x: SoftmaxInputs, chunk_size: int) -> dict[str, int]:
    """Block sizes and launch options."""
    key, default = _default_blocks(kernel, x.q.dtype, x.q.shape[3], x.v.shape[3], chunk_size)
    return parameters.pick(kernel, key, x.q.device, default)


def forward_blocks(x: SoftmaxInputs, chunk_size: int) -> dict[str, int]:
    """Those of the forward pass."""
    blocks = _blocks("softmax_forward", x, chunk_size)
    blocks["maxnreg"] = min(blocks["maxnreg"], 65536 // (32 * blocks["num_warps"]))  # what a multiprocessor has
    return blocks


@cache
def _default_blocks(kernel: str, dtype: torch.dtype, Ks: int, Vs: int, chunk_size: int) -> tuple[str, dict[str, int]]:
    """Key of the tables, and what fits registers and shared memory for every width that is allowed."""
    width = max(2 * triton.next_power_of_2(Ks), triton.next_power_of_2(Vs))
    wide = (width > 128) + (width > 256)
    block_m, block_n, warps, stages = _DEFAULTS[kernel, dtype == torch.float32][wide]
    default = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}
    if kernel == "softmax_forward":  # all that a thread may have; with fewer, more programs share a multiprocessor
        default["maxnreg"] = 255
    return parameters.shape_key(dtype, chunk_size, Ks, Vs), default


# (kernel, float32) → BLOCK_M, BLOCK_N, warps, stages for value widths up to 128, 256 and 512
_DEFAULTS = {
    ("softmax_forward", False): ((128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 8, 2)),
    ("softmax_forward", True): ((32, 64, 8, 2), (32, 32, 8, 1), (16, 16, 8, 1)),
    ("softmax_dq", False): ((128, 64, 8, 3), (128, 32, 8, 2), (64, 32, 8, 2)),
    ("softmax_dq", True): ((32, 32, 8, 2), (16, 32, 8, 1), (16, 16, 8, 1)),
    ("softmax_dkv", False): ((64, 128, 8, 2), (32, 64, 8, 3), (16, 64, 8, 1)),
    ("softmax_dkv", True): ((64, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 1)),
    ("softmax_counterfactual", False): ((128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 1)),
    ("softmax_counterfactual", True): ((32, 64, 8, 2), (16, 32, 8, 1), (16, 16, 8, 1)),
}


def _stats(q: Tensor) -> Tensor:
    """One float32 per query and head, to be written, in rows as long as ``softmax_kernels`` says."""
    B, T, Hq, _ = q.shape
    return q.new_empty((B, Hq, -(-T // 16) * 16), dtype=torch.float32)


def softmax_forward(x: SoftmaxInputs, cu_seqlens: Tensor | None, options: SoftmaxOptions) -> SoftmaxOutputs:
    """Forward pass of ``routed_softmax``."""
    C, scale = options.chunk_size, options.scale
    q, k, v, route = x = _row_major(x)
    B, T, Hq, _ = q.shape
    N, R = route.shape[1:]
    Hs = k.shape[2]
    o = q.new_empty(B, T, Hq, v.shape[3])
    lse = _stats(q)
    if cu_seqlens is not None:  # no tile reaches past the end of a sequence
        lse.zero_()
    starts, count = kept_chunks(route, cu_seqlens, C, T)
    outputs = SoftmaxOutputs(o, lse, starts, count)
    if B == 0:
        return outputs
    blocks = forward_blocks(x, C)
    tiles, positions = _tiles(cu_seqlens, C, blocks["BLOCK_M"], T, count)
    softmax_forward_kernel[(tiles, Hq, B)](
        q, k, v, route, starts, count, o, lse, *positions,
        scale * LOG2E, T, N, R, Hq // Hs, Hs // R,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        **_constants(x, C, cu_seqlens), **blocks,
    )  # fmt: skip
    return outputs


def softmax_backward(
    do: Tensor, x: SoftmaxInputs, outputs: SoftmaxOutputs, sampled: Tensor, cu_seqlens: Tensor | None,
    options: SoftmaxOptions, onto: tuple[Tensor, Callable[[], None]] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients dq, dk, dv (in the inputs' dtype) and the parts of droute [B,N,R,parts] float32, which is the sum of
    them (unwritten unless ``want_route``).

    sampled [B,N,R] float32 as ``sample_unchosen`` returns it. ``onto``: a contiguous tensor like v that dv is added to,
    in place, once the function has been called.
    """
    C, scale, counterfactual, want_route = options
    q, k, v, route = x = _row_major(x)
    do, o = last_contiguous(do), outputs.o.contiguous()
    lse, starts, count = outputs.lse, outputs.starts, outputs.counts
    B, T, Hq, _ = q.shape
    N, R = route.shape[1:]
    Hs = k.shape[2]
    J, G = Hq // Hs, Hs // R
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    dv, wait = (v.new_empty(v.shape), None) if onto is None else onto
    if B == 0:
        return dq, dk, dv, lse.new_empty(B, N, R, G)
    delta = _stats(q)
    constants = _constants(x, C, cu_seqlens)
    strides = [s for tensor in (q, k, v, do) for s in tensor.stride()[:3]]

    blocks = _blocks("softmax_dq", x, C)
    tiles, positions = _tiles(cu_seqlens, C, blocks["BLOCK_M"], T, count)
    softmax_dq_kernel[(tiles, Hq, B)](
        q, k, v, do, o, lse, route, starts, count, dq, delta, *positions,
        scale * LOG2E, scale, T, N, R, J, G, *strides, **constants, **blocks,
    )  # fmt: skip

    blocks = _blocks("softmax_dkv", x, C)
    covered = N * C + blocks["BLOCK_N"]  # tiles of two streams, the last of each not full
    if cu_seqlens is not None:  # a tile is inside a chunk
        covered = T
        shrink = max(1, blocks["BLOCK_N"] // C)
        for name, least in (("BLOCK_M", 16), ("BLOCK_N", 16), ("num_warps", 4)):
            blocks[name] = max(least, blocks[name] // shrink)
    tiles, positions = _tiles(cu_seqlens, C, blocks["BLOCK_N"], covered, count)
    parts = max(1, C // blocks["BLOCK_N"])
    da = lse.new_empty(B, N, R, G * parts) if want_route else delta
    if cu_seqlens is not None and want_route:  # no tile reaches past the end of a sequence
        da.zero_()
    if wait is not None:
        wait()
    softmax_dkv_kernel[(tiles, Hs, B)](
        q, k, v, do, lse, delta, route, starts, count, dk, dv, da, *positions,
        scale * LOG2E, scale, T, N, R, J, G, *strides, **constants, **blocks,
        WANT_ROUTE=want_route, ADD=onto is not None,
    )  # fmt: skip
    if not want_route:
        return dq, dk, dv, lse.new_empty(B, N, R, 1)

    if counterfactual != "none":
        blocks = _blocks("softmax_counterfactual", x, C)
        blocks["BLOCK_N"] = min(blocks["BLOCK_N"], C)
        if cu_seqlens is None:
            starts, count = kept_chunks(sampled, None, C, T)  # the weights are 0 or ≥ 1
        tiles, positions = _tiles(cu_seqlens, C, C, T, count)
        softmax_counterfactual_kernel[(tiles, Hs, B)](
            q, k, v, do, lse, delta, sampled, starts, count, da, *positions,
            scale * LOG2E, T, N, R, J, G, *strides, **constants, **blocks,
            PARTS=parts, MAX_SHIFT=MAX_EXPONENT * LOG2E, INSERTION=counterfactual == "insertion",
        )  # fmt: skip
    return dq, dk, dv, da


def _row_major(x: SoftmaxInputs) -> SoftmaxInputs:
    """The inputs as the kernels read them: q, k, v with neighbouring columns, route contiguous."""
    return SoftmaxInputs(last_contiguous(x.q), last_contiguous(x.k), last_contiguous(x.v), x.route.contiguous())


def sample_unchosen(unchosen: Tensor, counterfactual: str, rate: float) -> Tensor:
    """Weight float32 of every chunk that was left out: 0 (mode none) or an unbiased sample; 0 where one was kept."""
    weight = unchosen.to(torch.float32).contiguous()
    return sampling_weight(weight, unchosen, counterfactual, rate) * weight


def empty_outputs(x: SoftmaxInputs) -> SoftmaxOutputs:
    """Outputs of the forward pass, unwritten."""
    B, T, Hq, _ = x.q.shape
    N, R = x.route.shape[1:]
    return SoftmaxOutputs(
        x.q.new_empty(B, T, Hq, x.v.shape[3]),
        _stats(x.q),
        x.q.new_empty(B, R, N, dtype=torch.int32),
        x.q.new_empty(B, R, N + 1, dtype=torch.int32),
    )


@Replayed
def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor, route: Tensor, cu_seqlens: Tensor | None, chunk_size: int, scale: float
) -> list[Tensor]:
    return list(softmax_forward(SoftmaxInputs(q, k, v, route), cu_seqlens, SoftmaxOptions(chunk_size, scale)))


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, route: Tensor, *options: Any) -> list[Tensor]:
    return list(empty_outputs(SoftmaxInputs(q, k, v, route)))


@Replayed
def _launch_backward(
    do: Tensor, inputs: list[Tensor], outputs: list[Tensor], sampled: Tensor, cu_seqlens: Tensor | None,
    chunk_size: int, scale: float, counterfactual: str, want_route: bool,
) -> list[Tensor]:  # fmt: skip
    options = SoftmaxOptions(chunk_size, scale, counterfactual, want_route)
    return list(softmax_backward(do, SoftmaxInputs(*inputs), SoftmaxOutputs(*outputs), sampled, cu_seqlens, options))


def _run_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, route: Tensor, starts: Tensor, count: Tensor,
    sampled: Tensor, cu_seqlens: Tensor | None, chunk_size: int, scale: float, counterfactual: str, want_route: bool,
) -> list[Tensor]:  # fmt: skip
    inputs, outputs = [q, k, v, route], [o, lse, starts, count]
    *grads, parts = _launch_backward(
        do, inputs, outputs, sampled, cu_seqlens, chunk_size, scale, counterfactual, want_route
    )
    return [*grads, parts.sum(-1) if want_route else parts.new_empty(parts.shape[:3])]


def _fake_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, route: Tensor, *rest: Any
) -> list[Tensor]:
    droute = route.new_empty(route.shape, dtype=torch.float32)
    return [q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), droute]


_forward_op = register(
    "routed_softmax",
    "(Tensor q, Tensor k, Tensor v, Tensor route, Tensor? cu_seqlens, int chunk_size, float scale) -> Tensor[]",
    _launch_forward,
    _fake_forward,
)
_backward_op = register(
    "routed_softmax_backward",
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor route, Tensor starts, Tensor count, "
    "Tensor sampled, Tensor? cu_seqlens, int chunk_size, float scale, str counterfactual, bool want_route) -> Tensor[]",
    _run_backward,
    _fake_backward,
)


class _RoutedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, route: Tensor, sampled: Tensor, cu_seqlens: Tensor | None,
        chunk_size: int, scale: float, counterfactual: str,
    ) -> Tensor:  # fmt: skip
        o: Tensor
        o, lse, starts, count = _forward_op(q, k, v, route, cu_seqlens, chunk_size, scale)
        ctx.save_for_backward(q, k, v, o, lse, route, starts, count, sampled, cu_seqlens)  # as the op takes them
        ctx.options = (chunk_size, scale, counterfactual)
        ctx.route_dtype = route.dtype
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        _, _, _, want_route, *_ = ctx.needs_input_grad
        dq, dk, dv, droute = _backward_op(do, *ctx.saved_tensors, *ctx.options, want_route)
        return dq, dk, dv, (droute.to(ctx.route_dtype) if want_route else None), None, None, None, None, None


def routed_softmax(
    q: Tensor, k: Tensor, v: Tensor, route: Tensor, cu_seqlens: Tensor | None,
    chunk_size: int, scale: float, counterfactual: str, rate: float,
) -> Tensor:  # fmt: skip
    """Softmax branch on Triton; arguments as in ``natsl.kernels.softmax.routed_softmax``, route of 0 and 1."""
    sampled = route.detach()  # mode none reads no weights
    if counterfactual != "none":
        sampled = sample_unchosen(sampled <= 0.5, counterfactual, rate)
    o: Tensor = _RoutedSoftmax.apply(q, k, v, route, sampled, cu_seqlens, chunk_size, scale, counterfactual)  # type: ignore[no-untyped-call]
    return o
