"""The router of a layer: margins of chunks, and how a policy makes routes of them.

Shapes: B batch, T tokens, D width, C chunk size, N = ceil(T/C) chunks, R routing heads, P table points.
Source: arXiv 2602.03681, section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from natsl.compiled import CompiledLayer
from natsl.config import CalibrationScope, SupernetConfig
from natsl.kernels.routing import cap_limits, chunk_means, complete_chunks, route_margins


class RoutePair(NamedTuple):
    """Two routes apart: ``keep`` [B,N,R], 1 = softmax keeps the chunk; ``skip`` [B,N,R], 1 = the delta rule does not
    write it. The router's own are equal; a chunk may also be kept nowhere (0, 1), or kept and written (1, 0).
    """

    keep: Tensor
    skip: Tensor


@dataclass(frozen=True)
class LayerRouting:
    """What a layer's router did: margins [B,N,R] (None without a router), routes [B,N,R] (1 = softmax keeps).

    ``skip`` [B,N,R]: 1 = the delta rule did not write the chunk; the routes themselves unless they were fixed apart.
    """

    margins: Tensor | None
    route: Tensor
    skip: Tensor


@dataclass(frozen=True)
class LayerContext:
    """Everything a layer needs besides its input: the policies of the batch, as tensors, and the lengths.

    ``lengths`` [B] int64: real tokens per sequence (None: all). ``route``: fixed routes [B,N,R] instead of the router's
    (controls, tests), for both memories or one for each. ``training``: budgets become quantiles of the group itself and
    the routes carry a gradient.
    """

    policy: CompiledLayer
    lengths: Tensor | None
    route: Tensor | RoutePair | None = None
    training: SupernetConfig | None = None


class Router(nn.Linear):
    """Scores of the two memories for every routing head, from the mean input of a chunk: [.., D] → [.., 2·R].

    For each head first the score of the delta rule, then that of softmax.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, 2 * heads, bias=False)

    def margins(self, x: Tensor, chunk_size: int, lengths: Tensor | None) -> Tensor:
        """Score of softmax − score of the delta rule, x [B,T,D] → float32 [B,N,R]; ``lengths`` [B]: real tokens."""
        with torch.autocast(x.device.type, enabled=False):  # half-precision margins would tie
            means = chunk_means(x, chunk_size, lengths).to(self.weight.dtype)
            z: Tensor = self(means).float().unflatten(-1, (-1, 2))
        return z[..., 1] - z[..., 0]


def route_chunks(router: Router | None, x: Tensor, heads: int, chunk_size: int, context: LayerContext) -> LayerRouting:
    """Route every chunk of every sequence as its policy says; x [B,T,D], R = ``heads``.

    Without a router a layer can only keep all or nothing. In training the routes carry the router's gradient.
    """
    B, T, _ = x.shape
    N = -(-T // chunk_size)
    policy, training = context.policy, context.training
    margins = None
    if router is not None:
        source = x.detach() if training is None or training.detach_router else x
        margins = router.margins(source, chunk_size, context.lengths)
    if context.route is not None:
        pair = context.route if isinstance(context.route, RoutePair) else RoutePair(context.route, context.route)
        keep = skip = pair.keep.to(device=x.device, dtype=torch.float32)
        if pair.skip is not pair.keep:
            skip = pair.skip.to(keep)
        return LayerRouting(margins, keep, skip)
    if margins is None:
        route = policy.threshold.isneginf()[:, None].expand(B, N, heads).to(torch.float32)
        return LayerRouting(margins, route, route)
    theta, logits = policy.threshold[:, None], margins  # [B,1,R], [B,N,R]
    if training is not None:
        if training.route_noise > 0:  # the difference of two Gumbel variables is logistic
            u = torch.rand_like(margins).clamp(1e-6, 1 - 1e-6)
            logits = margins + training.route_noise * (u.log() - torch.log1p(-u))
        complete: Tensor | int = T // chunk_size
        if context.lengths is not None:
            complete = complete_chunks(context.lengths, chunk_size, N)
        theta = _training_thresholds(logits, complete, policy, training)
    limits = cap_limits(N, policy.cap, policy.burst, x.device) if policy.plan.capped else None
    route = route_margins(logits.detach(), theta.detach(), limits)
    if training is not None and torch.is_grad_enabled() and any(span.learns for span in policy.plan.spans):
        decided = theta.detach().isfinite()
        soft = straight_through(logits, theta.masked_fill(~decided, 0.0), route, training.route_temperature)
        # where nothing is decided no gradient flows, whatever arrives there
        route = torch.where(decided, soft, route)
        return LayerRouting(margins, *clamped_routes(route, decided, len(policy.plan.policies), training))
    return LayerRouting(margins, route, route)


def _training_thresholds(
    margins: Tensor, complete: Tensor | int, policy: CompiledLayer, training: SupernetConfig
) -> Tensor:
    """Thresholds [B,1,R] of margins [B,N,R], those of budgets by ``group_threshold``; ``complete`` as there."""
    policies = policy.plan.policies
    size = margins.shape[0] // len(policies)
    parts = []
    for i, layer in enumerate(policies):
        rows = slice(i * size, (i + 1) * size)
        theta = policy.threshold[rows, None]
        if layer.needs_calibration():
            chunks = complete if isinstance(complete, int) else complete[rows]
            budget = layer.budget if isinstance(layer.budget, float) else policy.budget[i * size]
            theta = group_threshold(margins[rows], chunks, budget, training).expand(size, 1, -1)
        parts.append(theta)
    return torch.cat(parts)


def straight_through(margins: Tensor, threshold: Tensor, hard: Tensor, temperature: float) -> Tensor:
    """Routes ``hard`` in the forward pass; backward as y = sigmoid((m − θ)/τ)."""
    y = torch.sigmoid((margins - threshold) / temperature)
    return hard + (y - y.detach())  # the bracket is exactly 0, so that routes stay exactly 0 or 1


def group_threshold(
    margins: Tensor, complete: Tensor | int, budget: float | Tensor, training: SupernetConfig
) -> Tensor:
    """Exact threshold of a budget over one training group, [1,1,R], of margins [B,N,R].

    ``budget``: a number strictly between 0 and 1, whose pool is what ``training.calibration`` says, or one per head,
    float64 [R] in [0, 1], each with a pool of its own. ``complete``: how many chunks of every sequence are complete, or
    a mask [B,N] of those that are. θ depends on the margins through the budget; with ``project_budget`` its implicit
    derivative dθ/dm ∝ σ'((m − θ)/τ) is in the backward pass, so that the router's gradient cannot drift along the
    direction that the budget undoes.
    """
    R = margins.shape[2]
    if isinstance(complete, int) and complete == 0:  # nothing to take a quantile of: a mask of no chunk
        complete = torch.zeros(margins.shape[:2], dtype=torch.bool, device=margins.device)
    if isinstance(complete, int):
        pool, absent = margins[:, :complete].flatten(0, 1), None  # [M,R]
    else:  # what is left out becomes NaN: picking it out would wait for the device
        pool, absent = margins.flatten(0, 1), ~complete.flatten()[:, None].expand(-1, R)
    if isinstance(budget, float) and training.calibration is CalibrationScope.layer:
        pool = pool.reshape(-1, 1)
        absent = None if absent is None else absent.reshape(-1, 1)
    level = 1.0 - (budget if isinstance(budget, float) else budget.to(pool.dtype))
    if absent is None:
        theta = torch.quantile(pool.detach(), level, dim=0)
    else:
        theta = torch.nanquantile(pool.detach().masked_fill(absent, math.nan), level, dim=0)
    if not isinstance(budget, float):
        theta = theta.diagonal()  # of [levels,R]: to each head the quantile of its own level
    if absent is not None:
        theta = theta.masked_fill(absent.all(0), -math.inf)
    if training.project_budget:
        y = torch.sigmoid((pool.detach() - theta) / training.route_temperature)
        slope = y * (1 - y) + 1e-12
        if absent is not None:
            slope = slope.masked_fill(absent, 0.0)
        centre = (slope * pool).sum(0) / slope.sum(0).clamp(min=1e-12)
        theta = theta + (centre - centre.detach())
    if not isinstance(budget, float):
        theta = theta.masked_fill(budget == 0, math.inf).masked_fill(budget == 1, -math.inf)
    return theta.expand(R)[None, None]


def clamped_routes(route: Tensor, decided: Tensor, groups: int, training: SupernetConfig) -> RoutePair:
    """Routes [B,N,R] for both memories, whose gradient is clamped before it reaches ``route``.

    The bound is ``gradient_clamp`` times the mean magnitude of the gradient of each of ``groups`` equal slices of the
    batch, over the heads that are ``decided`` [B,1,R], those whose threshold is finite; the others get no gradient.
    With a ``counterfactual_rate`` below 1 the side of a chunk that was not chosen arrives as a sample, scaled by
    1/rate: it is clamped before that scaling, so that in expectation the result is nearly the clamped gradient of rate
    1 (not quite, since the bound is an estimate from the same sample).
    """
    if training.gradient_clamp == 0:
        return RoutePair(route, route)
    options = (groups, training.gradient_clamp, training.counterfactual_rate)
    return RoutePair(*_ClampedRoutes.apply(route, decided, *options))  # type: ignore[no-untyped-call]


class _ClampedRoutes(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, route: Tensor, decided: Tensor, groups: int, factor: float, rate: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(route, decided)
        ctx.options = groups, factor, rate
        return route.view_as(route), route.view_as(route)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, keep: Tensor, skip: Tensor) -> tuple[Tensor | None, ...]:
        route, decided = ctx.saved_tensors
        groups, factor, rate = ctx.options
        kept = route > 0.5
        keep, skip = keep.where(decided, 0.0), skip.where(decided, 0.0)
        chosen = torch.where(kept, keep, skip)
        total = chosen + rate * torch.where(kept, skip, keep)  # both sides; one, where the other was not sampled
        count = _group_sums(decided.to(total.dtype).expand_as(total), groups).clamp(min=1)
        # What all magnitudes sum to, as the sample estimates it, an entry's own being known where it was sampled: else
        # a large one, whose magnitude is scaled too, would lift its own bound.
        own = total.abs()
        size = chosen.abs() + (own - chosen.abs()) / rate
        bound = factor / count * torch.maximum(_group_sums(size, groups) - size + own, own)
        base = chosen.clamp(-bound, bound)
        return base + (total.clamp(-bound, bound) - base) / rate, None, None, None, None


def _group_sums(x: Tensor, groups: int) -> Tensor:
    """Sums of x [B,N,R] over each of ``groups`` equal slices of the batch, for every row: [B,1,1]."""
    return x.reshape(groups, -1).sum(1).repeat_interleave(x.shape[0] // groups)[:, None, None]
