"""The softmax branch on Triton: launches of the kernels in ``softmax_kernels`` and the ops around them.

B batch, T tokens, C chunk size, N chunks, R routing heads, Hs key heads, Hq query heads, J = Hq/Hs, G = Hs/R, Ks and Vs
key and value width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from natsl.kernels._triton.routing import kept_chunks, packed_blocks
from natsl.kernels._triton.softmax_kernels import (
    softmax_counterfactual_kernel,
    softmax_dkv_kernel,
    softmax_dq_kernel,
    softmax_forward_kernel,
)
from natsl.kernels.dispatch import last_contiguous
from natsl.kernels.launch import parameters as tuning
from natsl.kernels.launch.launcher import Repeated
from natsl.kernels.launch.library import register
from natsl.kernels.reference import MAX_EXPONENT, sampling_weight

LOG2E = math.log2(math.e)


def _tiles(
    cu_seqlens: Tensor | None, chunk_size: int, size: int, tokens: int, unused: Tensor
) -> tuple[int, list[Tensor]]:
    """Number of tiles of ``size`` tokens, and the pointers that say where each lies (``unused`` if nothing is packed):
    cu_seqlens, the first chunk of every sequence, the sequence of every tile and its start inside it."""
    if cu_seqlens is None:
        return -(-tokens // size), [unused] * 4
    number = tokens // size + cu_seqlens.shape[0] - 1
    chunks = (cu_seqlens.diff() + (chunk_size - 1)) // chunk_size
    first_chunk = torch.nn.functional.pad(chunks.cumsum(0, dtype=torch.int32), (1, 0))
    return number, [cu_seqlens.to(torch.int32).contiguous(), first_chunk, *packed_blocks(cu_seqlens, size, number)]


def _shape_options(q: Tensor, v: Tensor, chunk_size: int, cu_seqlens: Tensor | None) -> dict[str, Any]:
    """The constants that all kernels take."""
    return dict(_constants(q.dtype, q.shape[3], v.shape[3], chunk_size), VARLEN=cu_seqlens is not None)


@cache
def _constants(dtype: torch.dtype, Ks: int, Vs: int, chunk_size: int) -> dict[str, Any]:
    return {
        "Ks": Ks,
        "Vs": Vs,
        "BLOCK_K": max(16, triton.next_power_of_2(Ks)),
        "BLOCK_V": max(16, triton.next_power_of_2(Vs)),
        "C": chunk_size,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "ieee",
    }


def _blocks(kernel: str, q: Tensor, v: Tensor, chunk_size: int) -> dict[str, int]:
    """Block sizes and launch options."""
    key, default = _default_blocks(kernel, q.dtype, q.shape[3], v.shape[3], chunk_size)
    return tuning.pick(kernel, key, q.device, default)


@cache
def _default_blocks(kernel: str, dtype: torch.dtype, Ks: int, Vs: int, chunk_size: int) -> tuple[str, dict[str, int]]:
    """Key of the tables, and what fits registers and shared memory for every width that is allowed."""
    width = max(2 * triton.next_power_of_2(Ks), triton.next_power_of_2(Vs))
    wide = (width > 128) + (width > 256)
    block_m, block_n, warps, stages = _DEFAULTS[kernel, dtype == torch.float32][wide]
    default = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}
    if kernel == "softmax_forward":  # all that a thread may have; with fewer, more programs share a multiprocessor
        default["maxnreg"] = 255
    return tuning.shape_key(dtype, chunk_size, Ks, Vs), default


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


def softmax_forward(
    q: Tensor, k: Tensor, v: Tensor, route: Tensor, cu_seqlens: Tensor | None, chunk_size: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward of ``routed_softmax``: o [B,T,Hq,Vs], lse [B,Hq,≥T] (base 2), and the kept chunks, starts and count."""
    B, T, Hq, _ = q.shape
    Hs, Vs, R = k.shape[2], v.shape[3], route.shape[2]
    q, k, v = map(last_contiguous, (q, k, v))
    route = route.contiguous()
    o = q.new_empty(B, T, Hq, Vs)
    lse = _stats(q)
    if cu_seqlens is not None:  # no tile reaches behind the end of a sequence
        lse.zero_()
    starts, count = kept_chunks(route, cu_seqlens, chunk_size, T)
    if B == 0:
        return o, lse, starts, count
    blocks = _blocks("softmax_forward", q, v, chunk_size)
    blocks["maxnreg"] = min(blocks["maxnreg"], 65536 // (32 * blocks["num_warps"]))  # what a multiprocessor has
    tiles, places = _tiles(cu_seqlens, chunk_size, blocks["BLOCK_M"], T, count)
    softmax_forward_kernel[(tiles, Hq, B)](
        q, k, v, route, starts, count, o, lse, *places,
        scale * LOG2E, T, route.shape[1], R, Hq // Hs, Hs // R,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        **_shape_options(q, v, chunk_size, cu_seqlens), **blocks,
    )  # fmt: skip
    return o, lse, starts, count


def softmax_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, route: Tensor, starts: Tensor, count: Tensor,
    sampled: Tensor, cu_seqlens: Tensor | None, chunk_size: int, scale: float, counterfactual: str, want_route: bool,
    onto: tuple[Tensor, Callable[[], None]] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients dq, dk, dv (in the inputs' dtype) and the parts of droute [B,N,R,parts] float32, which is the sum of
    them (unwritten unless ``want_route``).

    o, lse, starts, count as ``softmax_forward`` returns them; sampled [B,N,R] float32 as ``sample_unchosen`` does.
    ``onto``: a contiguous tensor like v that dv is added to, in place, once the function has been called.
    """
    B, T, Hq, _ = q.shape
    Hs, N, R = k.shape[2], route.shape[1], route.shape[2]
    J, G = Hq // Hs, Hs // R
    do, q, k, v = map(last_contiguous, (do, q, k, v))
    o, route = o.contiguous(), route.contiguous()
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    dv, wait = (v.new_empty(v.shape), None) if onto is None else onto
    if B == 0:
        return dq, dk, dv, lse.new_empty(B, N, R, G)
    delta = _stats(q)
    options = _shape_options(q, v, chunk_size, cu_seqlens)
    strides = [s for x in (q, k, v, do) for s in x.stride()[:3]]

    blocks = _blocks("softmax_dq", q, v, chunk_size)
    tiles, places = _tiles(cu_seqlens, chunk_size, blocks["BLOCK_M"], T, count)
    softmax_dq_kernel[(tiles, Hq, B)](
        q, k, v, do, o, lse, route, starts, count, dq, delta, *places,
        scale * LOG2E, scale, T, N, R, J, G, *strides, **options, **blocks,
    )  # fmt: skip

    blocks = _blocks("softmax_dkv", q, v, chunk_size)
    covered = N * chunk_size + blocks["BLOCK_N"]  # tiles of two streams, the last of each not full
    if cu_seqlens is not None:  # a tile lies inside a chunk
        covered = T
        shrink = max(1, blocks["BLOCK_N"] // chunk_size)
        for name, least in (("BLOCK_M", 16), ("BLOCK_N", 16), ("num_warps", 4)):
            blocks[name] = max(least, blocks[name] // shrink)
    tiles, places = _tiles(cu_seqlens, chunk_size, blocks["BLOCK_N"], covered, count)
    parts = max(1, chunk_size // blocks["BLOCK_N"])
    da = lse.new_empty(B, N, R, G * parts) if want_route else delta
    if cu_seqlens is not None and want_route:  # no tile reaches behind the end of a sequence
        da.zero_()
    if wait is not None:
        wait()
    softmax_dkv_kernel[(tiles, Hs, B)](
        q, k, v, do, lse, delta, route, starts, count, dk, dv, da, *places,
        scale * LOG2E, scale, T, N, R, J, G, *strides, **options, **blocks, WANT_ROUTE=want_route, ADD=onto is not None,
    )  # fmt: skip
    if not want_route:
        return dq, dk, dv, lse.new_empty(B, N, R, 1)

    if counterfactual != "none":
        blocks = _blocks("softmax_counterfactual", q, v, chunk_size)
        blocks["BLOCK_N"] = min(blocks["BLOCK_N"], chunk_size)
        if cu_seqlens is None:
            starts, count = kept_chunks(sampled, None, chunk_size, T)  # the weights are 0 or ≥ 1
        tiles, places = _tiles(cu_seqlens, chunk_size, chunk_size, T, count)
        softmax_counterfactual_kernel[(tiles, Hs, B)](
            q, k, v, do, lse, delta, sampled, starts, count, da, *places,
            scale * LOG2E, T, N, R, J, G, *strides, **options, **blocks,
            PARTS=parts, MAX_SHIFT=MAX_EXPONENT * LOG2E, INSERTION=counterfactual == "insertion",
        )  # fmt: skip
    return dq, dk, dv, da


def sample_unchosen(unchosen: Tensor, counterfactual: str, rate: float) -> Tensor:
    """Weight float32 of every chunk that was left out: 0 (mode none) or an unbiased sample; 0 where one was kept."""
    left = unchosen.to(torch.float32).contiguous()
    return sampling_weight(left, unchosen, counterfactual, rate) * left


def fake_forward(q: Tensor, k: Tensor, v: Tensor, route: Tensor, *unused: Any) -> list[Tensor]:
    """Outputs of the forward op, unwritten."""
    B, T, Hq, _ = q.shape
    N, R = route.shape[1:]
    return [
        q.new_empty(B, T, Hq, v.shape[3]),
        _stats(q),
        q.new_empty(B, R, N, dtype=torch.int32),
        q.new_empty(B, R, N + 1, dtype=torch.int32),
    ]


_launch_forward = Repeated(lambda *arguments: list(softmax_forward(*arguments)))
_launch_backward = Repeated(lambda *arguments: list(softmax_backward(*arguments)))


def _run_backward(*arguments: Any) -> list[Tensor]:
    *grads, parts = _launch_backward(*arguments)
    want_route = arguments[-1]
    return [*grads, parts.sum(-1) if want_route else parts.new_empty(parts.shape[:3])]


def _fake_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, route: Tensor, *unused: Any
) -> list[Tensor]:
    droute = route.new_empty(route.shape, dtype=torch.float32)
    return [q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), droute]


_forward_op = register(
    "routed_softmax",
    "(Tensor q, Tensor k, Tensor v, Tensor route, Tensor? cu_seqlens, int chunk_size, float scale) -> Tensor[]",
    _launch_forward,
    fake_forward,
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
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        q, k, v, route, sampled, cu_seqlens, chunk_size, scale, counterfactual = inputs
        o: Tensor
        o, lse, starts, count = _forward_op(q, k, v, route, cu_seqlens, chunk_size, scale)
        ctx.save_for_backward(q, k, v, o, lse, route, starts, count, sampled, cu_seqlens)
        ctx.options = (chunk_size, scale, counterfactual)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        want_route = ctx.needs_input_grad[3]
        dq, dk, dv, droute = _backward_op(grads[0], *tensors, *ctx.options, want_route)
        return dq, dk, dv, (droute.to(tensors[5].dtype) if want_route else None), *[None] * 5


def routed_softmax(
    q: Tensor, k: Tensor, v: Tensor, route: Tensor, cu_seqlens: Tensor | None,
    chunk_size: int, scale: float, counterfactual: str, rate: float,
) -> Tensor:  # fmt: skip
    """Softmax branch on Triton; arguments as in ``natsl.kernels.softmax.routed_softmax``, route of 0 and 1."""
    left = route.detach()  # mode none reads no weights
    sampled = left if counterfactual == "none" else sample_unchosen(left <= 0.5, counterfactual, rate)
    o: Tensor = _RoutedSoftmax.apply(q, k, v, route, sampled, cu_seqlens, chunk_size, scale, counterfactual)  # type: ignore[no-untyped-call]
    return o
