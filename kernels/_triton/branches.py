"""Both branches of a routed layer on Triton: one node of the graph, two streams on the device.

The scan of the delta rule keeps a few multiprocessors busy for long, the softmax branch all of them: side by side they
take little more than the longer one. Both streams start after what the caller's stream has queued and the caller's
stream goes on after both, so that no tensor is read too early or reused too soon.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from natsl.kernels._triton.delta import delta_backward, delta_forward
from natsl.kernels._triton.delta import fake_forward as fake_delta
from natsl.kernels._triton.softmax import fake_forward as fake_softmax
from natsl.kernels._triton.softmax import softmax_backward, softmax_forward
from natsl.kernels.dispatch import last_contiguous, split_values
from natsl.kernels.launch.launcher import Repeated, side_by_side
from natsl.kernels.launch.library import register


@Repeated
def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, q_softmax: Tensor, k_softmax: Tensor, g: Tensor, beta: Tensor, route: Tensor,
    chunk_size: int, scale: float, scale_softmax: float,
) -> list[Tensor]:  # fmt: skip
    v_softmax = split_values(v, q_softmax.shape[2])
    (o_delta, _, saved), softmax = side_by_side(
        q.device,
        lambda: delta_forward(q, k, v, g, beta, route, None, None, chunk_size, scale, True, False),
        lambda *_: softmax_forward(q_softmax, k_softmax, v_softmax, route, None, chunk_size, scale_softmax),
    )
    return [*softmax, o_delta, saved]


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, q_softmax: Tensor, k_softmax: Tensor, g: Tensor, beta: Tensor, route: Tensor,
    chunk_size: int, scale: float, scale_softmax: float,
) -> list[Tensor]:  # fmt: skip
    v_softmax = split_values(v, q_softmax.shape[2])
    o_delta, _, saved = fake_delta(q, k, v, g, beta, route, None, None, chunk_size, scale, True, False)
    return [*fake_softmax(q_softmax, k_softmax, v_softmax, route), o_delta, saved]


@Repeated
def _launch_backward(
    do_delta: Tensor, do_softmax: Tensor, q: Tensor, k: Tensor, v: Tensor, q_softmax: Tensor, k_softmax: Tensor,
    g: Tensor, beta: Tensor, route: Tensor, sampled: Tensor, softmax: list[Tensor], o_delta: Tensor, saved: Tensor,
    chunk_size: int, scale: float, scale_softmax: float, counterfactual: str, want_route: bool,
) -> list[Tensor]:  # fmt: skip
    """All gradients but that of the route, of which both sides come last: that of softmax in parts to be summed."""
    v_softmax = split_values(v, q_softmax.shape[2])
    o, lse, starts, count = softmax
    from_delta, (dq_softmax, dk_softmax, _, parts) = side_by_side(
        q.device,
        lambda: delta_backward(
            do_delta, None, q, k, v, g, beta, route, False, None, o_delta, saved, chunk_size, scale, True
        ),
        lambda from_delta, wait: softmax_backward(
            do_softmax, q_softmax, k_softmax, v_softmax, o, lse, route, starts, count, sampled, None, chunk_size,
            scale_softmax, counterfactual, want_route, (from_delta[2].view(v_softmax.shape), wait),
        ),
    )  # fmt: skip
    dq, dk, dv, dg, dbeta, droute, _ = from_delta
    return [dq, dk, dv, dq_softmax, dk_softmax, dg, dbeta, parts, droute]


def _run_backward(written: Tensor, *arguments: Any) -> list[Tensor]:
    want_route = arguments[-1]
    *grads, parts, droute = _launch_backward(*arguments)
    return [*grads, torch.addcmul(parts.sum(-1), droute, written) if want_route else droute]


def _fake_backward(written: Tensor, do_delta: Tensor, do_softmax: Tensor, *inputs: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in inputs[:8]]


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor q_softmax, Tensor k_softmax, Tensor g, Tensor beta, Tensor route"
_OPTIONS = "int chunk_size, float scale, float scale_softmax"
_forward_op = register("routed_branches", f"({_INPUTS}, {_OPTIONS}) -> Tensor[]", _run_forward, _fake_forward)
_backward_op = register(
    "routed_branches_backward",
    f"(Tensor written, Tensor do_delta, Tensor do_softmax, {_INPUTS}, Tensor sampled, Tensor[] softmax, "
    f"Tensor o_delta, Tensor saved, {_OPTIONS}, str counterfactual, bool want_route) -> Tensor[]",
    _run_backward,
    _fake_backward,
)


class _RoutedBranches(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        tensors, weights, options, counterfactual = inputs[:8], inputs[8:10], inputs[10:13], inputs[13]
        results = _forward_op(*tensors, *options)
        ctx.save_for_backward(*tensors, *weights, *results)
        ctx.options = (*options, counterfactual)
        ctx.set_materialize_grads(False)
        return results[4], results[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        inputs, written, softmax, delta = tensors[:9], tensors[9], list(tensors[10:14]), tensors[14:]
        do_delta, do_softmax = (
            torch.zeros_like(o) if do is None else last_contiguous(do)
            for do, o in zip(grads, (delta[0], softmax[0]), strict=True)
        )
        want_route = ctx.needs_input_grad[7]
        results = _backward_op(written, do_delta, do_softmax, *inputs, softmax, *delta, *ctx.options, want_route)
        if not want_route:
            results[7] = None
        return (*results, *[None] * 6)


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

    ``sampled`` [B,N,R] float32 (not read in mode none) weighs the softmax side of the routes' gradient where a chunk
    was left out, ``written`` [B,N,R] float32 or bool the delta side.
    """
    o_delta, o_softmax = _RoutedBranches.apply(  # type: ignore[no-untyped-call]
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
