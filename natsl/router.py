"""The router of a layer: margins of chunks, and how a policy makes routes of them.

Shapes: B batch, T tokens, D width, C chunk size, N = ceil(T/C) chunks, R routing heads, P table points.
Source: arXiv 2602.03681, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from natsl.config import CalibrationScope, SupernetConfig
from natsl.kernels.routing import budget_threshold, cap_limits, chunk_means, complete_chunks, route_margins
from natsl.space.policy import LayerPolicy, Op


@dataclass(frozen=True)
class LayerRouting:
    """What a layer's router did: margins [B,N,R] (None without a router), routes [B,N,R] (1 = softmax keeps)."""

    margins: Tensor | None
    route: Tensor


@dataclass(frozen=True)
class LayerContext:
    """Everything a layer needs besides its input: the policies of the batch's equal consecutive groups and the lengths.

    ``policies``: one per group. ``lengths`` [B] int64: real tokens per sequence (None: all). ``calibration`` [R,P]:
    quantiles of the margins, needed where a budget becomes a threshold. ``route`` [B,N,R]: fixed routes instead of the
    router's (random-routing controls, tests). ``training``: budgets become quantiles of the group itself and the routes
    carry a gradient.
    """

    policies: Sequence[LayerPolicy]
    lengths: Tensor | None
    calibration: Tensor
    route: Tensor | None = None
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
    """Route every chunk of every group as its policy says; x [B,T,D], R = ``heads``.

    Without a router a layer can only keep all or nothing. In training the routes carry the router's gradient.
    """
    B, T, _ = x.shape
    N = -(-T // chunk_size)
    training = context.training
    margins = None
    if router is not None:
        source = x.detach() if training is None or training.detach_router else x
        margins = router.margins(source, chunk_size, context.lengths)
    if context.route is not None:
        return LayerRouting(margins, context.route.to(device=x.device, dtype=torch.float32))
    size = B // len(context.policies)
    complete: Tensor | int = T // chunk_size
    if context.lengths is not None:
        complete = complete_chunks(context.lengths, chunk_size, N)
    parts = []
    for i, policy in enumerate(context.policies):
        rows = slice(i * size, (i + 1) * size)
        if margins is None or policy.op is not Op.routed:
            fixed = 0.0 if policy.op is Op.delta else 1.0
            parts.append(x.new_full((size, N, heads), fixed, dtype=torch.float32))
        else:
            chunks = complete if isinstance(complete, int) else complete[rows]
            parts.append(_route_group(margins[rows], chunks, policy, context))
    return LayerRouting(margins, parts[0] if len(parts) == 1 else torch.cat(parts))


def _route_group(margins: Tensor, complete: Tensor | int, policy: LayerPolicy, context: LayerContext) -> Tensor:
    """Routes of one group; ``margins`` [B,N,R] and ``complete`` (see ``quantile_threshold``) are those of its rows."""
    training = context.training
    if training is not None and training.route_noise > 0:  # the difference of two Gumbel variables is logistic
        u = torch.rand_like(margins).clamp(1e-6, 1 - 1e-6)
        margins = margins + training.route_noise * (u.log() - torch.log1p(-u))
    if policy.threshold is not None:
        theta = margins.new_full((1, 1, 1), policy.threshold)
        finite = math.isfinite(policy.threshold)
    elif policy.budget is None:
        raise ValueError("a routed layer needs a budget or a threshold")
    else:
        finite = 0.0 < policy.budget < 1.0 and not (isinstance(complete, int) and complete == 0)
        if training is not None:
            theta = quantile_threshold(margins, complete, policy.budget, training)
        else:
            device, points = context.calibration.device, context.calibration.shape[-1]
            levels = torch.linspace(0.0, 1.0, points, dtype=torch.float64, device=device)
            budget = torch.full((1,), policy.budget, dtype=torch.float64, device=device)
            theta = budget_threshold(context.calibration, levels, budget).to(margins.dtype)[None, None]
    limits = None
    if policy.cap is not None:
        limits = cap_limits(margins.shape[1], policy.cap, policy.burst, margins.device)
    route = route_margins(margins.detach(), theta.detach(), limits)
    if training is not None and torch.is_grad_enabled() and finite:
        route = straight_through(margins, theta, route, training.route_temperature)
        if training.gradient_clamp > 0:
            clamp_gradient(route, training.gradient_clamp)
    return route


def straight_through(margins: Tensor, threshold: Tensor, hard: Tensor, temperature: float) -> Tensor:
    """Routes ``hard`` in the forward pass; backward as y = sigmoid((m − θ)/τ)."""
    y = torch.sigmoid((margins - threshold) / temperature)
    return hard + (y - y.detach())  # the bracket is exactly 0, so that routes stay exactly 0 or 1


def quantile_threshold(margins: Tensor, complete: Tensor | int, budget: float, training: SupernetConfig) -> Tensor:
    """Exact threshold of a budget over one training group, broadcastable to margins [B,N,R].

    ``complete``: how many chunks of every sequence are complete, or a mask [B,N] of those that are. θ depends on the
    margins through the budget; with ``project_budget`` its implicit derivative dθ/dm ∝ σ'((m − θ)/τ) is in the backward
    pass, so that the router's gradient cannot drift along the direction that the budget undoes.
    """
    if budget in (0.0, 1.0) or (isinstance(complete, int) and complete == 0):
        return torch.full_like(margins[:1, :1], math.inf if budget == 0.0 else -math.inf)
    if isinstance(complete, int):
        pool, absent = margins[:, :complete].flatten(0, 1), None  # [M,R]
    else:  # what is left out becomes NaN: picking it out would wait for the device
        pool, absent = margins.flatten(0, 1), ~complete.flatten()[:, None].expand(-1, margins.shape[2])
    if training.calibration is CalibrationScope.layer:
        pool = pool.reshape(-1, 1)
        absent = None if absent is None else absent.reshape(-1, 1)
    if absent is None:
        theta = torch.quantile(pool.detach(), 1.0 - budget, dim=0)
    else:
        theta = torch.nanquantile(pool.detach().masked_fill(absent, math.nan), 1.0 - budget, dim=0)
        theta = theta.masked_fill(absent.all(0), -math.inf)
    if training.project_budget:
        y = torch.sigmoid((pool.detach() - theta) / training.route_temperature)
        slope = y * (1 - y) + 1e-12
        if absent is not None:
            slope = slope.masked_fill(absent, 0.0)
        centre = (slope * pool).sum(0) / slope.sum(0).clamp(min=1e-12)
        theta = theta + (centre - centre.detach())
    return theta[None, None]


def clamp_gradient(route: Tensor, factor: float) -> None:
    """Clamp the gradient that reaches the routes at ± factor × its mean magnitude."""
    if route.requires_grad:

        def hook(grad: Tensor) -> Tensor:
            bound = factor * grad.abs().mean()
            return grad.clamp(-bound, bound)

        route.register_hook(hook)
