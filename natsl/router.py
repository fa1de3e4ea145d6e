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

from natsl.cache import LayerCache
from natsl.compiled import CompiledLayer, Span
from natsl.config import CalibrationScope, RouteGradient
from natsl.kernels.routing import cap_limits, chunk_means, complete_chunks, continued_means, route_margins
from natsl.kernels.segment import running_sum, touched_chunks
from natsl.layout import Layout
from natsl.modules import precise

# Smallest weight of a step's chunks in the running mean and variance of a router's input.
MOMENTUM = 0.02


class RoutePair(NamedTuple):
    """Two routes apart: ``keep`` [B,N,R], 1 = softmax keeps the chunk; ``skip`` [B,N,R], 1 = the delta rule does not
    write it. The router's own are equal; a chunk may also be kept nowhere (0, 1), or kept and written (1, 0).

    ``visible`` bool [B,N,N,R], if given: which earlier chunks (third axis) the queries of a chunk (second axis) see,
    and the mix counts, instead of those of ``keep``, which is then only what is billed. On torch, without packing or a
    cache.
    """

    keep: Tensor
    skip: Tensor
    visible: Tensor | None = None


@dataclass(frozen=True)
class LayerRouting:
    """What a layer's router did: margins [B,N,R] (None without a router), routes [B,N,R] (1 = softmax keeps).

    ``skip`` [B,N,R]: 1 = the delta rule did not write the chunk; the routes themselves unless they were fixed apart.
    ``visible``: as in ``RoutePair``.
    """

    margins: Tensor | None
    route: Tensor
    skip: Tensor
    visible: Tensor | None = None


@dataclass(frozen=True)
class LayerContext:
    """Everything a layer needs besides its input: the policies of the sequences, as tensors, and where these are.

    ``route``: fixed routes [B,N,R] instead of the router's (controls, tests), for both memories or one for each.
    ``cache``: the state of the layer, from which it goes on; N is then that of the chunks that the call touches, from
    the open one on (``touched_chunks``). ``gradient``: budgets become quantiles of the batch itself and the routes
    carry a gradient.
    """

    policy: CompiledLayer
    layout: Layout
    cache: LayerCache | None = None
    route: Tensor | RoutePair | None = None
    gradient: RouteGradient | None = None

    def spans(self) -> tuple[Span, ...]:
        """The rows that share a computation: packed sequences all do, and those of a cache."""
        spans, cache = self.policy.plan.spans, self.cache
        if self.layout.packing is None and cache is None:
            return spans
        # a later policy may need both memories of the chunk that stays open
        both = any(span.both for span in spans) if cache is None else None not in (cache.delta, cache.pages)
        return (
            Span(
                rows=slice(0, None),
                both=both,
                masked=any(span.masked or not span.both for span in spans),
                tempered=any(span.tempered for span in spans),
                learns=any(span.learns for span in spans),
            ),
        )

    def per_token(self, x: Tensor, rows: slice) -> Tensor:
        """A value per sequence [S], for the tokens of ``rows``: broadcastable to [B,T,1,1]."""
        packing = self.layout.packing
        x = x[rows, None] if packing is None else x[packing.sequence][None]
        return x[..., None, None]


class Router(nn.Linear):
    """Scores of the two memories for every routing head, from the mean input of a chunk: [.., D] → [.., 2·R].

    For each head first the score of the delta rule, then that of softmax. ``norm``: each dimension of a mean is
    standardised by its running mean and variance over the chunks of training, ``mean`` and ``variance`` [D]. Else what
    all chunks have in common outweighs what tells them apart: heads are chosen before chunks are.
    """

    mean: Tensor
    variance: Tensor
    updates: Tensor

    def __init__(self, width: int, heads: int, norm: bool = False) -> None:
        super().__init__(width, 2 * heads, bias=False)
        self.norm = norm
        if norm:
            self.bias = nn.Parameter(torch.zeros(2 * heads))  # heads differ in how much they gain at all
            self.register_buffer("mean", torch.zeros(width))
            self.register_buffer("variance", torch.ones(width))
            self.register_buffer("updates", torch.zeros(()))

    @torch.no_grad()
    def observe(self, means: Tensor, real: Tensor | None) -> None:
        """Update the running statistics with the means of chunks [B,N,D], those that are ``real`` [B,N] (None: all)."""
        rows = means.flatten(0, 1).to(self.mean.dtype)
        weight = rows.new_ones(len(rows), 1) if real is None else real.reshape(-1, 1).to(rows.dtype)
        weight = weight / weight.sum()
        share = (1.0 / (self.updates + 1)).clamp(min=MOMENTUM)
        mean = self.mean.lerp((weight * rows).sum(0), share)
        variance = self.variance.lerp((weight * (rows - mean).square()).sum(0), share)
        finite = (mean.isfinite() & variance.isfinite()).all()  # else the step is left out, for its loss is not either
        self.updates += finite
        self.mean.copy_(torch.where(finite, mean, self.mean))
        self.variance.copy_(torch.where(finite, variance, self.variance))

    def margin_weights(self) -> tuple[Tensor, Tensor]:
        """Weight [R,D] and bias [R], float32, that give the margins of the means of chunks as they are."""
        w = (self.weight[1::2] - self.weight[::2]).float().contiguous()
        if not self.norm:
            return w, w.new_zeros(len(w))
        w = w * (self.variance.float() + 1e-8).rsqrt()
        return w, (self.bias[1::2] - self.bias[::2]).float() - w @ self.mean.float()

    def margins(self, means: Tensor) -> Tensor:
        """Score of softmax − score of the delta rule, from the means of chunks: [B,N,D] → at least float32 [B,N,R]."""
        with torch.autocast(means.device.type, enabled=False):  # half-precision margins would tie
            x = means.to(self.weight.dtype)
            if self.norm:
                x = (x - self.mean) * (self.variance + 1e-8).rsqrt()
            z: Tensor = precise(self(x)).unflatten(-1, (-1, 2))
        return z[..., 1] - z[..., 0]


def route_chunks(router: Router | None, x: Tensor, heads: int, chunk_size: int, context: LayerContext) -> LayerRouting:
    """Route every chunk of every sequence as its policy says; x [B,T,D], R = ``heads``.

    Without a router a layer can only keep all or nothing. In training the routes carry the router's gradient.
    """
    policy, gradient, cache = context.policy, context.gradient, context.cache
    lengths, packing, start = context.layout.lengths, context.layout.packing, context.layout.start
    N = -(-x.shape[1] // chunk_size) if cache is None else touched_chunks(x.shape[1], chunk_size)
    margins = None
    if router is not None:
        source = x.detach() if gradient is None or gradient.detach_router else x
        if cache is not None:
            assert start is not None
            assert cache.total is not None
            at_border = context.layout.at_border
            means, cache.total = continued_means(source, start, cache.total, chunk_size, lengths, at_border=at_border)
        else:
            means = chunk_means(source, chunk_size, lengths) if packing is None else packing.chunk_means(source)
        learns = router.training and router.weight.requires_grad
        if router.norm and learns and gradient is not None:
            real = None if lengths is None else complete_chunks(lengths + chunk_size - 1, chunk_size, N)
            router.observe(means, real)
        margins = router.margins(means)
    if context.route is not None:
        pair = context.route if isinstance(context.route, RoutePair) else RoutePair(context.route, context.route)
        keep = skip = pair.keep.to(device=x.device, dtype=torch.float32)
        if pair.skip is not pair.keep:
            skip = pair.skip.to(keep)
        if pair.visible is None:
            return LayerRouting(margins, keep, skip)
        if packing is not None or cache is not None:
            raise ValueError("RoutePair.visible goes with neither packed sequences nor a cache")
        shape = (x.shape[0], N, N, heads)
        if pair.visible.shape != shape or pair.visible.dtype != torch.bool:
            form = f"{pair.visible.dtype} {tuple(pair.visible.shape)}"
            raise ValueError(f"RoutePair.visible is {form}: it must be bool {shape}")
        return LayerRouting(margins, keep, skip, pair.visible.to(x.device))
    if margins is None:
        kept = policy.threshold.isneginf().to(torch.float32)
        route = kept[:, None].expand(-1, N, heads) if packing is None else kept[packing.chunk_sequence][None]
        return LayerRouting(margins, route, route)
    if packing is None:
        pair = _decide(margins, chunk_size, x.shape[1], context)
    else:
        pair = _decide(packing.chunk_rows(margins), chunk_size, packing.most * chunk_size, context)
        keep = packing.pack_rows(pair.keep)
        pair = RoutePair(keep, keep if pair.skip is pair.keep else packing.pack_rows(pair.skip))
    return LayerRouting(margins, pair.keep, pair.skip)


def kept_before(route: Tensor, context: LayerContext) -> Tensor:
    """How many chunks of its sequence each head has kept before each chunk: routes [B,N,R] → int64 [B,N,R]."""
    packing = context.layout.packing
    kept = route.long()  # sums of integers are deterministic on a GPU too
    before = running_sum(kept) - kept
    if packing is not None:
        first = torch.arange(route.shape[1], device=route.device) - packing.chunk_index
        before = before - before[:, first]
    return before


def seen_before(visible: Tensor) -> Tensor:
    """How many earlier chunks each chunk sees: ``RoutePair.visible`` → int64 [B,N,R]."""
    earlier = torch.ones(visible.shape[1:3], dtype=torch.bool, device=visible.device).tril(-1)
    return (visible & earlier[..., None]).sum(2)


def _decide(margins: Tensor, chunk_size: int, tokens: int, context: LayerContext) -> RoutePair:
    """Routes of margins [B,N,R] with a sequence in each row; ``tokens``: T, of which the layout's lengths are real."""
    policy, gradient, cache = context.policy, context.gradient, context.cache
    lengths, read = context.layout.lengths, context.layout.read
    N = margins.shape[1]
    theta, logits = policy.threshold[:, None], margins  # [B,1,R], [B,N,R]
    if gradient is not None:
        if gradient.route_noise > 0:  # the difference of two Gumbel variables is logistic
            u = torch.rand_like(margins).clamp(1e-6, 1 - 1e-6)
            logits = margins + gradient.route_noise * (u.log() - torch.log1p(-u))
        complete: Tensor | int = tokens // chunk_size
        if lengths is not None:
            complete = complete_chunks(lengths, chunk_size, N)
        theta = _training_thresholds(logits, complete, policy, gradient)
    limits = kept = None
    if policy.plan.capped:
        done = None if read is None else read // chunk_size
        limits = cap_limits(N, policy.cap, policy.burst, margins.device, done)
        kept = None if cache is None or cache.pages is None else cache.pages.kept
    route = route_margins(logits.detach(), theta.detach(), limits, kept)
    if gradient is None or not torch.is_grad_enabled() or not any(span.learns for span in policy.plan.spans):
        return RoutePair(route, route)
    decided = theta.detach().isfinite()
    soft = straight_through(logits, theta.masked_fill(~decided, 0.0), route, gradient.route_temperature)
    if lengths is not None:
        decided = decided & complete_chunks(lengths + chunk_size - 1, chunk_size, N)[..., None]
    # where nothing is decided no gradient flows, whatever arrives there
    route = torch.where(decided, soft, route)
    return clamped_routes(route, decided, len(policy.plan.policies), gradient)


def _training_thresholds(
    margins: Tensor, complete: Tensor | int, policy: CompiledLayer, gradient: RouteGradient
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
            theta = group_threshold(margins[rows], chunks, budget, gradient).expand(size, 1, -1)
        parts.append(theta)
    return torch.cat(parts)


def straight_through(margins: Tensor, threshold: Tensor, hard: Tensor, temperature: float) -> Tensor:
    """Routes ``hard`` in the forward pass; backward as y = sigmoid((m − θ)/τ)."""
    y = torch.sigmoid((margins - threshold) / temperature)
    return hard + (y - y.detach())  # the bracket is exactly 0, so that routes stay exactly 0 or 1


def group_threshold(margins: Tensor, complete: Tensor | int, budget: float | Tensor, gradient: RouteGradient) -> Tensor:
    """Exact threshold of a budget over one training group, [1,1,R], of margins [B,N,R].

    ``budget``: a number strictly between 0 and 1, whose pool is what ``gradient.calibration`` says, or one per head,
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
    if isinstance(budget, float) and gradient.calibration is CalibrationScope.layer:
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
    if gradient.project_budget:
        y = torch.sigmoid((pool.detach() - theta) / gradient.route_temperature)
        slope = y * (1 - y) + 1e-12
        if absent is not None:
            slope = slope.masked_fill(absent, 0.0)
        centre = (slope * pool).sum(0) / slope.sum(0).clamp(min=1e-12)
        theta = theta + (centre - centre.detach())
    if not isinstance(budget, float):
        theta = theta.masked_fill(budget == 0, math.inf).masked_fill(budget == 1, -math.inf)
    return theta.expand(R)[None, None]


def clamped_routes(route: Tensor, decided: Tensor, groups: int, gradient: RouteGradient) -> RoutePair:
    """Routes [B,N,R] for both memories, whose gradient is clamped before it reaches ``route``.

    The bound is ``gradient_clamp`` times the mean magnitude of the gradient of each of ``groups`` equal slices of the
    batch, over what is ``decided`` [B,1,R] or [B,N,R], heads whose threshold is finite; the others get no gradient.
    With a ``counterfactual_rate`` below 1 the side of a chunk that was not chosen arrives as a sample, scaled by
    1/rate: it is clamped before that scaling, so that in expectation the result is nearly the clamped gradient of rate
    1 (not quite, since the bound is an estimate from the same sample).
    """
    if gradient.gradient_clamp == 0:
        return RoutePair(route, route)
    options = (groups, gradient.gradient_clamp, gradient.counterfactual_rate)
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
