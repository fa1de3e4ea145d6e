"""Both branches of a routed layer on Triton: one node of the graph, two streams on the device.

The scan of the delta rule keeps a few multiprocessors busy for long, the softmax branch all of them: side by side they
take little more than the longer one. Both streams start after what the caller's stream has queued and the caller's
stream goes on after both, so that no tensor is read too early or reused too soon.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from natsl.kernels.delta_triton import delta_backward, delta_forward, last_contiguous
from natsl.kernels.softmax_triton import softmax_backward, softmax_forward

A = TypeVar("A")
B = TypeVar("B")


@cache
def _side_stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index, priority=-1)  # its few blocks go first


def _side_by_side(device: torch.device, side: Callable[[], A], main: Callable[[], B]) -> tuple[A, B]:
    """Results of both functions, whose kernels run at the same time on a GPU.

    What the side stream allocates needs no record: it is used after the join, and the next fork waits for its users.
    """
    if device.type != "cuda":
        return side(), main()
    here = torch.cuda.current_stream(device)
    there = _side_stream(here.device_index)
    there.wait_stream(here)
    with torch.cuda.stream(there):
        first = side()
    second = main()
    here.wait_stream(there)
    return first, second


def _split_values(v: Tensor, heads: int) -> Tensor:
    """v [B,T,R,V] as [B,T,heads,·], a view where the strides allow."""
    split: Tensor = v.unflatten(3, (heads // v.shape[2], -1)).flatten(2, 3)
    return split


@torch.library.custom_op("natsl::routed_branches", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_softmax: Tensor,
    k_softmax: Tensor,
    g: Tensor,
    beta: Tensor,
    route: Tensor,
    sampled: Tensor,
    written: Tensor,
    chunk_size: int,
    scale: float,
    scale_softmax: float,
    counterfactual: str,
) -> list[Tensor]:
    v_softmax = _split_values(v, q_softmax.shape[2])
    (o_delta, _, saved), softmax = _side_by_side(
        q.device,
        lambda: delta_forward(q, k, v, g, beta, route, None, None, chunk_size, scale, True, False),
        lambda: softmax_forward(q_softmax, k_softmax, v_softmax, route, None, chunk_size, scale_softmax),
    )
    return [o_delta, *softmax, *saved]


@_forward_op.register_fake
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_softmax: Tensor,
    k_softmax: Tensor,
    g: Tensor,
    beta: Tensor,
    route: Tensor,
    sampled: Tensor,
    written: Tensor,
    chunk_size: int,
    scale: float,
    scale_softmax: float,
    counterfactual: str,
) -> list[Tensor]:
    v_softmax = _split_values(v, q_softmax.shape[2])
    delta = torch.ops.natsl.routed_delta_rule(q, k, v, g, beta, route, None, None, chunk_size, scale, True, False)
    zero = torch.empty_like(route)
    softmax = torch.ops.natsl.routed_softmax(
        q_softmax, k_softmax, v_softmax, route, zero, None, chunk_size, scale_softmax, "none"
    )
    return [delta[0], *softmax, *delta[2:]]


@torch.library.custom_op("natsl::routed_branches_backward", mutates_args=())
def _backward_op(
    do_delta: Tensor,
    do_softmax: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_softmax: Tensor,
    k_softmax: Tensor,
    g: Tensor,
    beta: Tensor,
    route: Tensor,
    sampled: Tensor,
    written: Tensor,
    softmax: list[Tensor],
    saved: list[Tensor],
    chunk_size: int,
    scale: float,
    scale_softmax: float,
    counterfactual: str,
    want_route: bool,
) -> list[Tensor]:
    v_softmax = _split_values(v, q_softmax.shape[2])
    o, lse, starts, count = softmax
    delta, (dq_softmax, dk_softmax, dv_softmax, droute) = _side_by_side(
        q.device,
        lambda: delta_backward(
            do_delta, None, q, k, v, g, beta, route, False, None, saved, chunk_size, scale, True
        ),
        lambda: softmax_backward(
            do_softmax, q_softmax, k_softmax, v_softmax, o, lse, route, starts, count, sampled, None, chunk_size,
            scale_softmax, counterfactual, want_route,
        ),
    )  # fmt: skip
    dq, dk, dv, dg, dbeta, droute_delta, _ = delta
    dv = dv.add_(dv_softmax.view(dv.shape))
    if want_route:
        droute = torch.addcmul(droute, droute_delta, written)
    return [dq, dk, dv, dq_softmax, dk_softmax, dg, dbeta, droute]


@_backward_op.register_fake
def _backward_fake(
    do_delta: Tensor,
    do_softmax: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_softmax: Tensor,
    k_softmax: Tensor,
    g: Tensor,
    beta: Tensor,
    route: Tensor,
    sampled: Tensor,
    written: Tensor,
    softmax: list[Tensor],
    saved: list[Tensor],
    chunk_size: int,
    scale: float,
    scale_softmax: float,
    counterfactual: str,
    want_route: bool,
) -> list[Tensor]:
    inputs = (q, k, v, q_softmax, k_softmax, g, beta, route)
    return [x.new_empty(x.shape) for x in inputs]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*inputs[:10], *output[1:5], output[0], *output[5:])
    ctx.options = inputs[10:]
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    inputs, softmax, saved = tensors[:10], tensors[10:14], tensors[14:]
    do_delta, do_softmax = last_contiguous(grads[0]), last_contiguous(grads[1])
    results = _backward_op(
        do_delta, do_softmax, *inputs, list(softmax), list(saved), *ctx.options, ctx.needs_input_grad[7]
    )
    return (*results, *[None] * 6)


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def routed_branches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_softmax: Tensor,
    k_softmax: Tensor,
    g: Tensor,
    beta: Tensor,
    route: Tensor,
    sampled: Tensor,
    written: Tensor,
    chunk_size: int,
    scale: float,
    scale_softmax: float,
    counterfactual: str,
) -> tuple[Tensor, Tensor]:
    """Both branches; arguments as in ``natsl.kernels.branches.routed_branches``, already checked.

    ``sampled`` and ``written`` [B,N,R] float32 weigh the softmax and the delta side of the routes' gradient.
    """
    o_delta, o_softmax, *_ = _forward_op(
        *(last_contiguous(x) for x in (q, k, v, q_softmax, k_softmax)),
        g.float().contiguous(),
        beta.float().contiguous(),
        route,
        sampled,
        written,
        chunk_size,
        scale,
        scale_softmax,
        counterfactual,
    )
    return o_delta, o_softmax
