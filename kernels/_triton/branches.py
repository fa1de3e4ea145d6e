"""Both branches of a routed layer on Triton: one node of the graph, two streams on the device.

The scan of the delta rule keeps a few multiprocessors busy for long, the softmax branch all of them: side by side they
take little more than the longer one. Both streams start after what the caller's stream has queued and the caller's
stream goes on after both, so that no tensor is read too early or reused too soon.

Shapes: B batch, T tokens, C chunk size, N chunks, R routing heads, K key width, V value width of the delta rule, Hs =
R·G softmax heads, Ks key width, Vs = V/G value width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from natsl.kernels._triton import delta as delta_triton
from natsl.kernels._triton import softmax as softmax_triton
from natsl.kernels._triton.delta import DeltaInputs, DeltaOptions
from natsl.kernels._triton.softmax import SoftmaxInputs, SoftmaxOptions, SoftmaxOutputs
from natsl.kernels.dispatch import last_contiguous, split_values
from natsl.kernels.launch.library import on_own_device, register
from natsl.kernels.launch.replay import Replayed, side_by_side


class BranchInputs(NamedTuple):
    """What the two branches read; all but g, beta and the routes, which are float32, of one dtype."""

    q: Tensor  # [B,T,R,K]
    k: Tensor  # [B,T,R,K]
    v: Tensor  # [B,T,R,V]
    q_softmax: Tensor  # [B,T,Hs,Ks]
    k_softmax: Tensor  # [B,T,Hs,Ks]
    g: Tensor  # [B,T,R]
    beta: Tensor  # [B,T,R]
    route: Tensor  # [B,N,R] of 0 and 1; 1: softmax keeps the chunk
    delta_route: Tensor | None = None  # [B,N,R] of 0 and 1; 1: the delta rule does not write it; None: as route

    def delta(self) -> DeltaInputs:
        route = self.route if self.delta_route is None else self.delta_route
        return DeltaInputs(self.q, self.k, self.v, self.g, self.beta, route)

    def softmax(self) -> SoftmaxInputs:
        values = split_values(self.v, self.q_softmax.shape[2])
        return SoftmaxInputs(self.q_softmax, self.k_softmax, values, self.route)


class BranchOptions(NamedTuple):
    """How the branches are computed."""

    chunk_size: int
    scale: float  # of the delta rule
    scale_softmax: float


@Replayed
def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor, q_softmax: Tensor, k_softmax: Tensor, g: Tensor, beta: Tensor, route: Tensor,
    delta_route: Tensor | None, cu_seqlens: Tensor | None, chunk_size: int, scale: float, scale_softmax: float,
) -> list[Tensor]:  # fmt: skip
    """Output and saved tensors of softmax (``SoftmaxOutputs``), then output and saved buffer of the delta rule."""
    x = BranchInputs(q, k, v, q_softmax, k_softmax, g, beta, route, delta_route)
    delta_options, softmax_options = DeltaOptions(chunk_size, scale, True), SoftmaxOptions(chunk_size, scale_softmax)
    delta, softmax = side_by_side(
        q.device,
        lambda: delta_triton.delta_forward(x.delta(), None, cu_seqlens, delta_options, False),
        lambda *_: softmax_triton.softmax_forward(x.softmax(), cu_seqlens, softmax_options),
    )
    return [*softmax, delta.o, delta.saved]


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, q_softmax: Tensor, k_softmax: Tensor, g: Tensor, beta: Tensor, route: Tensor,
    delta_route: Tensor | None, cu_seqlens: Tensor | None, chunk_size: int, scale: float, scale_softmax: float,
) -> list[Tensor]:  # fmt: skip
    x = BranchInputs(q, k, v, q_softmax, k_softmax, g, beta, route, delta_route)
    delta = delta_triton.empty_outputs(x.delta(), cu_seqlens, chunk_size, False)
    return [*softmax_triton.empty_outputs(x.softmax()), delta.o, delta.saved]


@Replayed
def _launch_backward(
    do_delta: Tensor, do_softmax: Tensor, inputs: list[Tensor], cu_seqlens: Tensor | None, sampled: Tensor,
    softmax: list[Tensor], o_delta: Tensor, saved: Tensor,
    chunk_size: int, scale: float, scale_softmax: float, counterfactual: str, want_route: bool,
) -> list[Tensor]:  # fmt: skip
    """All gradients but that of the routes, of which both sides come last: that of softmax in parts to be summed."""
    x = BranchInputs(*inputs)
    x_softmax = x.softmax()
    delta_options = DeltaOptions(chunk_size, scale, True)
    softmax_options = SoftmaxOptions(chunk_size, scale_softmax, counterfactual, want_route)
    (dq, dk, dv, dg, dbeta, droute, _), (dq_softmax, dk_softmax, _, parts) = side_by_side(
        x.q.device,
        lambda: delta_triton.delta_backward(
            do_delta, None, x.delta(), False, cu_seqlens, o_delta, saved, delta_options
        ),
        lambda delta, wait: softmax_triton.softmax_backward(
            do_softmax, x_softmax, SoftmaxOutputs(*softmax), sampled, cu_seqlens, softmax_options,
            onto=(delta.dv.view(x_softmax.v.shape), wait),
        ),
    )  # fmt: skip
    return [dq, dk, dv, dq_softmax, dk_softmax, dg, dbeta, parts, droute]


def _run_backward(
    written: Tensor, do_delta: Tensor, do_softmax: Tensor,
    q: Tensor, k: Tensor, v: Tensor, q_softmax: Tensor, k_softmax: Tensor, g: Tensor, beta: Tensor, route: Tensor,
    delta_route: Tensor | None, cu_seqlens: Tensor | None, sampled: Tensor, softmax: list[Tensor], o_delta: Tensor,
    saved: Tensor, chunk_size: int, scale: float, scale_softmax: float, counterfactual: str, want_route: bool,
    want_delta_route: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the inputs that are there, in their order; those of the routes are meaningless unless wanted."""
    inputs = [x for x in (q, k, v, q_softmax, k_softmax, g, beta, route, delta_route) if x is not None]
    *grads, parts, droute = _launch_backward(
        do_delta, do_softmax, inputs, cu_seqlens, sampled, softmax, o_delta, saved,
        chunk_size, scale, scale_softmax, counterfactual, want_route,
    )  # fmt: skip
    if delta_route is None:
        return [*grads, torch.addcmul(parts.sum(-1), droute, written) if want_route else droute]
    dsoftmax_route = parts.sum(-1) if want_route else parts.new_empty(parts.shape[:3])
    return [*grads, dsoftmax_route, droute * written if want_delta_route else droute]


def _fake_backward(
    written: Tensor, do_delta: Tensor, do_softmax: Tensor,
    q: Tensor, k: Tensor, v: Tensor, q_softmax: Tensor, k_softmax: Tensor, g: Tensor, beta: Tensor, route: Tensor,
    delta_route: Tensor | None, *rest: Any,
) -> list[Tensor]:  # fmt: skip
    inputs = (q, k, v, q_softmax, k_softmax, g, beta, route, delta_route)
    return [x.new_empty(x.shape) for x in inputs if x is not None]


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor q_softmax, Tensor k_softmax, Tensor g, Tensor beta, Tensor route, "
    "Tensor? delta_route, Tensor? cu_seqlens"
)
_OPTIONS = "int chunk_size, float scale, float scale_softmax"
_forward_op = register("routed_branches", f"({_INPUTS}, {_OPTIONS}) -> Tensor[]", _launch_forward, _fake_forward)
_backward_op = register(
    "routed_branches_backward",
    f"(Tensor written, Tensor do_delta, Tensor do_softmax, {_INPUTS}, Tensor sampled, Tensor[] softmax, "
    f"Tensor o_delta, Tensor saved, {_OPTIONS}, str counterfactual, bool want_route, bool want_delta_route) -> "
    "Tensor[]",
    _run_backward,
    _fake_backward,
)


class _RoutedBranches(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, q_softmax: Tensor, k_softmax: Tensor, g: Tensor, beta: Tensor,
        route: Tensor, delta_route: Tensor | None, cu_seqlens: Tensor | None, sampled: Tensor, written: Tensor,
        options: BranchOptions, counterfactual: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        inputs = (q, k, v, q_softmax, k_softmax, g, beta, route, delta_route, cu_seqlens)
        o_softmax, lse, starts, count, o_delta, saved = _forward_op(*inputs, *options)
        ctx.save_for_backward(*inputs, sampled, written, o_softmax, lse, starts, count, o_delta, saved)
        ctx.options, ctx.counterfactual = options, counterfactual
        ctx.set_materialize_grads(False)
        return o_delta, o_softmax

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_delta: Tensor | None, do_softmax: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, sampled, written, o_softmax, lse, starts, count, o_delta, saved = ctx.saved_tensors
        do_delta = torch.zeros_like(o_delta) if do_delta is None else last_contiguous(do_delta)
        do_softmax = torch.zeros_like(o_softmax) if do_softmax is None else last_contiguous(do_softmax)
        want_route, want_delta_route = ctx.needs_input_grad[7:9]
        grads = _backward_op(
            written, do_delta, do_softmax, *inputs, sampled, [o_softmax, lse, starts, count], o_delta, saved,
            *ctx.options, ctx.counterfactual, want_route, want_delta_route,
        )  # fmt: skip
        droute, ddelta_route = grads[7] if want_route else None, grads[8] if want_delta_route else None
        return *grads[:7], droute, ddelta_route, None, None, None, None, None


def routed_branches(
    x: BranchInputs,
    cu_seqlens: Tensor | None,
    sampled: Tensor,
    written: Tensor,
    options: BranchOptions,
    counterfactual: str,
) -> tuple[Tensor, Tensor]:
    """Both branches; arguments as in ``natsl.kernels.branches.routed_branches``, of any strides and already checked.

    ``sampled`` [B,N,R] float32 (not read in mode none) weighs the softmax side of the routes' gradient where a chunk
    was left out, ``written`` [B,N,R] float32 or bool the delta side. Returns o_delta and o_softmax.
    """
    o_delta, o_softmax = _RoutedBranches.apply(  # type: ignore[no-untyped-call]
        last_contiguous(x.q),
        last_contiguous(x.k),
        last_contiguous(x.v),
        last_contiguous(x.q_softmax),
        last_contiguous(x.k_softmax),
        x.g.float().contiguous(),
        x.beta.float().contiguous(),
        x.route,
        x.delta_route,
        cu_seqlens,
        sampled,
        written,
        options,
        counterfactual,
    )
    return o_delta, o_softmax


@on_own_device
def run_side_by_side(x: Tensor, side: Callable[[], Any], main: Callable[..., Any]) -> tuple[Any, Any]:
    """``side_by_side`` on the device of ``x``."""
    return side_by_side(x.device, side, main)
