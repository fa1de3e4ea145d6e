"""One layer's two memories: softmax attention and Gated DeltaNet on shared projections, with a router between them.

Shapes: B batch, T tokens, D width, C chunk size, N chunks, R routing heads, Hs softmax heads, K/V key/value width of a
routing head. Source: arXiv 2602.03681, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natsl.compiled import Span
from natsl.config import ModelConfig
from natsl.kernels.branches import continued_branches, routed_branches
from natsl.kernels.convolution import continued_convolution
from natsl.kernels.delta import DeltaState, routed_delta_rule
from natsl.kernels.mix import gated_norm, routed_mix
from natsl.kernels.pages import KeyPages, PagePlan, paged_softmax, plan_pages
from natsl.kernels.softmax import routed_softmax
from natsl.layout import Layout
from natsl.modules import RMSNorm, causal_attention, precise, short_convolution, visible_attention, with_zero_gradients
from natsl.router import LayerContext, LayerRouting, RoutePair, Router, kept_before, route_chunks, seen_before
from natsl.space.policy import Op

# Factor of ``mix_bias``: a step of AdamW changes a scalar by the learning rate at most, and some need to reach ±.3.
BIAS_GAIN = 8.0


def rotation_rates(width: int, theta: float, device: torch.device) -> Tensor:
    """Radians per position of the rotary embedding of a head of this width, float32 [width/2]."""
    half = width // 2
    rates: Tensor = theta ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    return rates


def rotate(x: Tensor, theta: float, positions: Tensor) -> Tensor:
    """Rotary position embedding over the whole head width; x [B,T,H,K], positions [B,T], or [1,T] for all rows."""
    rate = rotation_rates(x.shape[3], theta, x.device)
    angle = positions[..., None, None].to(torch.float32) * rate  # [B,T,1,K/2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


@dataclass(frozen=True)
class _Rows:
    """Rows of the batch that share a computation, after the projections.

    ``qkv``: q, k [B,T,R·K] and v [B,T,R·V]. gate [B,T,Hs,Vs], routes [B,N,R]; ``gates`` (g, beta) where the delta rule
    takes part, ``logits`` [B,T,Hs,2] where both memories do, ``plan`` where there are pages.
    """

    qkv: tuple[Tensor, Tensor, Tensor]
    gate: Tensor
    routes: RoutePair
    gates: tuple[Tensor, Tensor] | None
    logits: Tensor | None
    plan: PagePlan | None


class RoutedMixer(nn.Module):
    """Mixing layer of kind ``delta`` (Gated DeltaNet), ``softmax`` (attention) or ``routed`` (both and a router)."""

    def __init__(self, config: ModelConfig, kind: Op) -> None:
        super().__init__()
        c = self.config = config
        self.kind = kind
        self.key_width, self.value_width = c.heads * c.key_dim, c.heads * c.value_dim
        channels = 2 * self.key_width + self.value_width
        self.qkv_proj = nn.Linear(c.width, channels, bias=False)
        self.conv = nn.Parameter(torch.empty(channels, c.conv_width))
        self.gate_proj = nn.Linear(c.width, self.value_width, bias=False)
        self.out_proj = nn.Linear(self.value_width, c.width, bias=False)
        head_value = c.value_dim // c.softmax_per_head
        if kind is not Op.delta:
            gain = 1.5 if c.associative_init else 1.0
            self.q_norm = RMSNorm(c.key_dim // c.softmax_per_head, c.norm_eps, gain)
            self.k_norm = RMSNorm(c.key_dim // c.softmax_per_head, c.norm_eps, gain)
            self.softmax_norm = nn.Parameter(torch.ones(head_value))
        if kind is not Op.softmax:
            self.a_proj = nn.Linear(c.width, c.heads, bias=False)
            self.b_proj = nn.Linear(c.width, c.heads)
            self.A_log = nn.Parameter(torch.empty(c.heads))
            self.dt_bias = nn.Parameter(torch.empty(c.heads))
            self.delta_norm = nn.Parameter(torch.ones(head_value))
        if kind is Op.routed:
            self.mix_proj = nn.Linear(self.key_width, 2 * c.softmax_heads)
            self.mix_bias = nn.Parameter(torch.zeros(2 * c.softmax_heads))
            self.router = Router(c.width, c.heads, c.router_norm)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weights.

        With ``associative_init`` the convolution starts as identity (q, v) and shift by one (k) and W_k as a copy of
        W_q, so that a key looks for what followed its last occurrence: recall appears without a curriculum.
        """
        c = self.config
        for linear in (self.qkv_proj, self.gate_proj):
            nn.init.normal_(linear.weight, std=c.width**-0.5)
        nn.init.normal_(self.out_proj.weight, std=(2 * len(c.layers) * self.value_width) ** -0.5)
        nn.init.normal_(self.conv, std=0.09 if c.associative_init else c.conv_width**-0.5)
        if c.associative_init:
            with torch.no_grad():
                K = self.key_width
                self.qkv_proj.weight[K : 2 * K] = self.qkv_proj.weight[:K]
                self.conv[:, -1] += 1.0
                if c.conv_width > 1:
                    self.conv[K : 2 * K, -1] -= 1.0
                    self.conv[K : 2 * K, -2] += 1.0
        if self.kind is not Op.softmax:
            nn.init.normal_(self.a_proj.weight, std=0.02)
            nn.init.normal_(self.b_proj.weight, std=0.02)
            with torch.no_grad():
                self.b_proj.bias.fill_(1.0)
                if c.associative_init:
                    self.A_log.zero_()
                    self.dt_bias.fill_(-6.0)
                else:  # as Mamba-2 and Gated DeltaNet start: A in [1, 16], step in [0.001, 0.1]
                    self.A_log.uniform_(1.0, 16.0).log_()
                    step = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
                    self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))
        if self.kind is Op.routed:
            nn.init.zeros_(self.mix_proj.weight)
            nn.init.zeros_(self.mix_proj.bias)
            nn.init.zeros_(self.mix_bias)
            nn.init.normal_(self.router.weight, std=0.002 if self.router.norm else 0.02)

    def forward(self, x: Tensor, context: LayerContext) -> tuple[Tensor, LayerRouting]:
        """Mix tokens: x [B,T,D] (normed) → [B,T,D] and the routing that happened."""
        B, T, _ = x.shape
        c = self.config
        qkv = self._convolve(self.qkv_proj(x), context)
        gate = self.gate_proj(x).view(B, T, c.softmax_heads, -1)
        router = self.router if self.kind is Op.routed else None
        routing = route_chunks(router, x, c.heads, c.chunk_size, context)
        outputs, spans = [], context.spans()
        plan = self._plan(routing.route, T, context)
        for span in spans:
            rows = span.rows
            q, k, v = self.split(qkv[rows])
            keep, visible = routing.route[rows], None if routing.visible is None else routing.visible[rows]
            gates = logits = None
            if span.both:
                if plan is not None:
                    before = plan.before
                else:
                    before = kept_before(keep, context) if visible is None else seen_before(visible)
                logits = self._mix_logits(q, before, context, span)
            if self.kind is not Op.softmax:
                gates = self.gates(x[rows])
            routes = RoutePair(keep, keep if routing.skip is routing.route else routing.skip[rows], visible)
            if not span.learns:  # the ops then leave out the routes' gradient
                routes = RoutePair(routes.keep.detach(), routes.skip.detach(), visible)
            # autocast would make half precision of the products inside the torch backend, which are float32 on purpose
            with torch.autocast(x.device.type, enabled=False):
                outputs.append(self._mix(_Rows((q, k, v), gate[rows], routes, gates, logits, plan), context))
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if torch.is_grad_enabled():
            y = with_zero_gradients(y, self.unused(spans, context.route is None and routing.route.requires_grad))
        routing = LayerRouting(routing.margins, routing.route.detach(), routing.skip.detach())
        return self.out_proj(y.reshape(B, T, -1)), routing

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k [B,T,R·K] and v [B,T,R·V] of what the convolution gives."""
        q, k, v = qkv.split((self.key_width, self.key_width, self.value_width), -1)
        return q, k, v

    def delta_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of the delta rule, [B,T,R,·], of those of ``split``."""
        q, k, v = (x.unflatten(2, (self.config.heads, -1)) for x in (q, k, v))
        return q, k, v

    def softmax_heads(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of softmax, [B,T,Hs,·], of those of ``split``: normed and at their positions."""
        c = self.config
        q, k, v = (x.unflatten(2, (c.softmax_heads, -1)) for x in (q, k, v))
        q, k = self.q_norm(q), self.k_norm(k)
        if c.rope:
            positions = layout.positions(q.shape[1], q.device)
            q, k = rotate(q, c.rope_theta, positions), rotate(k, c.rope_theta, positions)
        return q, k, v

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log decay g and write strength beta of the delta rule, at least float32 [B,T,R]."""
        a, b, A_log, dt_bias = (precise(y) for y in (self.a_proj(x), self.b_proj(x), self.A_log, self.dt_bias))
        return -A_log.exp() * F.softplus(a + dt_bias), torch.sigmoid(b)

    def _convolve(self, x: Tensor, context: LayerContext) -> Tensor:
        """The short convolution of every sequence by itself, from its last inputs if there is a cache."""
        layout, cache = context.layout, context.cache
        if cache is None:
            return short_convolution(x, self.conv, None if layout.packing is None else layout.packing.position)
        y, cache.tail = continued_convolution(x, self.conv, cache.tail, layout.lengths)
        return y

    def _plan(self, route: Tensor, tokens: int, context: LayerContext) -> PagePlan | None:
        """What the routes [B,N,R] of a call do to the pages in the cache, if there are any."""
        cache, layout = context.cache, context.layout
        if cache is None or cache.pages is None:
            return None
        assert layout.start is not None
        size, kept = self.config.chunk_size, cache.pages.kept
        return plan_pages(route, kept, layout.start, tokens=tokens, chunk_size=size, lengths=layout.lengths)

    def unused(self, spans: Sequence[Span], learns: bool) -> list[nn.Parameter]:
        """Parameters of a routed layer without influence on its output; ``learns``: whether its router has any."""
        if self.kind is not Op.routed:
            return []
        unused = [] if learns else list(self.router.parameters())
        if not any(span.both for span in spans):
            unused += [p for part in (self.q_norm, self.k_norm, self.mix_proj) for p in part.parameters()]
            unused += [self.softmax_norm, self.mix_bias]
        return unused

    def _mix_logits(self, q: Tensor, before: Tensor, context: LayerContext, span: Span) -> Tensor:
        """Logits [B,T,Hs,2] of the branches' weights for the rows of a span: queries q [B,T,R·K].

        The query does not know how many earlier chunks softmax has for it, n = ``before`` int64 [B,N,R]. A bias times
        1 / (1 + n) does; it takes no gradient to the routes.
        """
        c, T, policy = self.config, q.shape[1], context.policy
        share = BIAS_GAIN / (1 + before)[..., None]  # [B,N,R,1]
        bias = (share * self.mix_bias.view(c.heads, -1)).flatten(2)  # [B,N,2·Hs]
        logits: Tensor = self.mix_proj(q)
        logits = logits + context.layout.spread(bias.to(logits.dtype), T, c.chunk_size)
        logits = logits.view(*q.shape[:2], -1, 2)
        if span.tempered:
            temperature = context.per_token(policy.temperature, span.rows)
            logits = (precise(logits) / temperature).to(logits.dtype)
        if span.masked:
            softmax = torch.arange(2, device=q.device) > 0
            logits = logits.masked_fill(context.per_token(policy.delta_only, span.rows) & softmax, -math.inf)
        return logits

    def _mix(self, rows: _Rows, context: LayerContext) -> Tensor:
        """Run the memories that these rows use and combine what they give: [B,T,Hs,Vs]."""
        eps = self.config.norm_eps
        o_delta, o_softmax = (self._memories if context.cache is None else self._continued_memories)(rows, context)
        if o_delta is not None:
            o_delta = o_delta.reshape(rows.gate.shape)
        if o_softmax is None:
            assert o_delta is not None
            return gated_norm(o_delta, rows.gate, self.delta_norm, eps=eps)
        if o_delta is None:
            return gated_norm(o_softmax, rows.gate, self.softmax_norm, eps=eps)
        assert rows.logits is not None
        return routed_mix(o_delta, o_softmax, rows.gate, rows.logits, self.delta_norm, self.softmax_norm, eps=eps)

    def _memories(self, rows: _Rows, context: LayerContext) -> tuple[Tensor | None, Tensor | None]:
        """Outputs of the delta rule [B,T,R,V] and of softmax [B,T,Hs,Vs], None for one that these rows do not use."""
        gradient, packing = context.gradient, context.layout.packing
        chunk_size, keep = self.config.chunk_size, rows.routes.keep
        borders = None if packing is None else packing.cu_seqlens
        mode = gradient.counterfactual.value if gradient else "none"
        rate = gradient.counterfactual_rate if gradient else 1.0
        visible = rows.routes.visible
        if rows.gates is None:
            q, k, v = self.softmax_heads(*rows.qkv, context.layout)
            if visible is not None:
                return None, visible_attention(q, k, v, visible, chunk_size)
            # every chunk is kept; on a CPU torch's attention may hold all scores at once, the routed op never does
            if context.route is None and packing is None and v.is_cuda:
                return None, causal_attention(q, k, v)
            return None, routed_softmax(q, k, v, keep, chunk_size=chunk_size, cu_seqlens=borders)
        q, k, v = self.delta_heads(*rows.qkv)
        if rows.logits is None or visible is not None:
            o_delta, _ = routed_delta_rule(
                q,
                k,
                v,
                *rows.gates,
                rows.routes.skip,
                chunk_size=chunk_size,
                cu_seqlens=borders,
                counterfactual=mode,
                counterfactual_rate=rate,
            )
            if rows.logits is None or visible is None:
                return o_delta, None
            qs, ks, vs = self.softmax_heads(*rows.qkv, context.layout)
            return o_delta, visible_attention(qs, ks, vs, visible, chunk_size)
        qs, ks, _ = self.softmax_heads(*rows.qkv, context.layout)
        return routed_branches(
            q,
            k,
            v,
            qs,
            ks,
            *rows.gates,
            keep,
            delta_route=rows.routes.skip,
            chunk_size=chunk_size,
            cu_seqlens=borders,
            counterfactual=mode,
            counterfactual_rate=rate,
        )

    def _continued_memories(self, rows: _Rows, context: LayerContext) -> tuple[Tensor | None, Tensor | None]:
        """``_memories`` from the states in the cache, which are updated."""
        cache, layout, chunk_size = context.cache, context.layout, self.config.chunk_size
        assert cache is not None
        assert layout.start is not None
        tokens, keep, skip, plan = rows.gate.shape[1], rows.routes.keep, rows.routes.skip, rows.plan
        options: dict[str, Any] = {"chunk_size": chunk_size, "lengths": layout.lengths}

        def pages() -> KeyPages:
            assert plan is not None
            cache.make_room(plan.kept, tokens, chunk_size)
            assert cache.pages is not None
            return cache.pages

        if cache.pages is not None:
            q, k, v = self.softmax_heads(*rows.qkv, layout)
        if cache.delta is None:
            options |= {"plan": plan, "at_border": layout.at_border}
            o_softmax, cache.pages = paged_softmax(q, k, v, keep, pages(), layout.start, **options)
            return None, o_softmax
        assert rows.gates is not None
        options["parts"] = layout.parts
        inputs = self.delta_heads(*rows.qkv)
        if cache.pages is None:
            o_delta, state = routed_delta_rule(
                *inputs, *rows.gates, skip, initial_state=cache.delta, output_final_state=True, **options
            )
            assert isinstance(state, DeltaState)
            cache.delta = state
            return o_delta, None
        o_delta, cache.delta, o_softmax, cache.pages = continued_branches(
            *inputs, q, k, *rows.gates, keep, cache.delta, pages, delta_route=skip, plan=plan, **options
        )
        return o_delta, o_softmax
