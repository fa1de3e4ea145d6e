"""One layer's two memories: softmax attention and Gated DeltaNet on shared projections, with a router between them.

Shapes: B batch, T tokens, D width, C chunk size, N chunks, R routing heads, Hs softmax heads, K/V key/value width of a
routing head. Source: arXiv 2602.03681, section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natsl.compiled import CompiledLayer, Span
from natsl.config import ModelConfig
from natsl.kernels.branches import routed_branches
from natsl.kernels.delta import routed_delta_rule
from natsl.kernels.mix import gated_norm, routed_mix
from natsl.kernels.softmax import routed_softmax
from natsl.modules import RMSNorm, causal_attention, short_convolution
from natsl.router import LayerContext, LayerRouting, RoutePair, Router, route_chunks
from natsl.space.policy import Op


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary position embedding over the whole head width; x [B,T,H,K], positions 0…T−1."""
    T, half = x.shape[1], x.shape[3] // 2
    rate = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(T, device=x.device, dtype=torch.float32)[:, None] * rate
    cos, sin = angle.cos()[None, :, None].to(x.dtype), angle.sin()[None, :, None].to(x.dtype)
    a, b = x.split(half, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


@dataclass(frozen=True)
class _Rows:
    """Rows of the batch that share a computation, after the projections.

    q, k [B,T,R·K], v [B,T,R·V], gate [B,T,Hs,Vs], routes [B,N,R]; ``gates`` (g, beta) where the delta rule takes part,
    ``logits`` [B,T,Hs,2] where both memories do.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    routes: RoutePair
    gates: tuple[Tensor, Tensor] | None
    logits: Tensor | None


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
            self.router = Router(c.width, c.heads)
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
            nn.init.normal_(self.router.weight, std=0.02)

    def forward(self, x: Tensor, context: LayerContext) -> tuple[Tensor, LayerRouting]:
        """Mix tokens: x [B,T,D] (normed) → [B,T,D] and the routing that happened."""
        B, T, _ = x.shape
        c = self.config
        qkv = short_convolution(self.qkv_proj(x), self.conv)
        gate = self.gate_proj(x).view(B, T, c.softmax_heads, -1)
        router = self.router if self.kind is Op.routed else None
        routing = route_chunks(router, x, c.heads, c.chunk_size, context)
        outputs = []
        for span in context.policy.plan.spans:
            rows = span.rows
            q, k, v = qkv[rows].split((self.key_width, self.key_width, self.value_width), -1)
            gates = logits = None
            if span.both:
                logits = self._mix_logits(q, context.policy, span)
            if self.kind is not Op.softmax:
                gates = self._gates(x[rows])
            keep = routing.route[rows]
            routes = RoutePair(keep, keep if routing.skip is routing.route else routing.skip[rows])
            if not span.learns:  # the ops then leave out the routes' gradient
                routes = RoutePair(routes.keep.detach(), routes.skip.detach())
            # autocast would make half precision of the products inside the torch backend, which are float32 on purpose
            with torch.autocast(x.device.type, enabled=False):
                outputs.append(self._mix(_Rows(q, k, v, gate[rows], routes, gates, logits), context))
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        routing = LayerRouting(routing.margins, routing.route.detach(), routing.skip.detach())
        return self.out_proj(y.reshape(B, T, -1)), routing

    def _mix_logits(self, q: Tensor, policy: CompiledLayer, span: Span) -> Tensor:
        """Logits [B,T,Hs,2] of the branches' weights for the rows of a span, whose queries are q [B,T,R·K]."""
        logits: Tensor = self.mix_proj(q).view(*q.shape[:2], -1, 2)
        if span.tempered:
            logits = (logits.float() / policy.temperature[span.rows, None, None, None]).to(logits.dtype)
        if span.masked:
            softmax = torch.arange(2, device=q.device) > 0
            logits = logits.masked_fill(policy.delta_only[span.rows, None, None, None] & softmax, -math.inf)
        return logits

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log decay g and write strength beta of the delta rule, float32 [B,T,R]."""
        g = -self.A_log.float().exp() * F.softplus(self.a_proj(x).float() + self.dt_bias.float())
        return g, torch.sigmoid(self.b_proj(x).float())

    def _mix(self, rows: _Rows, context: LayerContext) -> Tensor:
        """Run the memories that these rows use and combine what they give: [B,T,Hs,Vs]."""
        c, training = self.config, context.training
        B, T, _ = rows.q.shape
        mode = training.counterfactual.value if training else "none"
        rate = training.counterfactual_rate if training else 1.0
        q, k, v = (x.reshape(B, T, c.heads, -1) for x in (rows.q, rows.k, rows.v))
        if rows.gates is None or rows.logits is not None:
            qs, ks = (x.reshape(B, T, c.softmax_heads, -1) for x in (rows.q, rows.k))
            qs, ks = self.q_norm(qs), self.k_norm(ks)
            if c.rope:
                qs, ks = rotate(qs, c.rope_theta), rotate(ks, c.rope_theta)
        if rows.gates is None:
            values = v.reshape(B, T, c.softmax_heads, -1)
            # every chunk is kept; on a CPU torch's attention may hold all scores at once, the routed op never does
            if context.route is None and v.is_cuda:
                o_softmax = causal_attention(qs, ks, values)
            else:
                o_softmax = routed_softmax(qs, ks, values, rows.routes.keep, chunk_size=c.chunk_size)
            return gated_norm(o_softmax, rows.gate, self.softmax_norm, eps=c.norm_eps)
        g, beta = rows.gates
        if rows.logits is None:
            o_delta, _ = routed_delta_rule(
                q,
                k,
                v,
                g,
                beta,
                rows.routes.skip,
                chunk_size=c.chunk_size,
                counterfactual=mode,
                counterfactual_rate=rate,
            )
            o_delta = o_delta.reshape(rows.gate.shape)
            return gated_norm(o_delta, rows.gate, self.delta_norm, eps=c.norm_eps)
        o_delta, o_softmax = routed_branches(
            q,
            k,
            v,
            qs,
            ks,
            g,
            beta,
            rows.routes.keep,
            delta_route=rows.routes.skip,
            chunk_size=c.chunk_size,
            counterfactual=mode,
            counterfactual_rate=rate,
        )
        return routed_mix(
            o_delta.reshape(rows.gate.shape),
            o_softmax,
            rows.gate,
            rows.logits,
            self.delta_norm,
            self.softmax_norm,
            eps=c.norm_eps,
        )
