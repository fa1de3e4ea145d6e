"""A decoder-only language model whose layers hold two memories; the routing policy is an argument of ``forward``.

Shapes: B batch, T tokens, D width, N chunks, R routing heads.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natsl.config import ModelConfig, Precision, SupernetConfig
from natsl.mixer import RoutedMixer
from natsl.modules import RMSNorm, SwiGLU, linear_cross_entropy
from natsl.router import LayerContext, LayerRouting
from natsl.space.policy import Op, RoutingPolicy


@dataclass(frozen=True)
class LMOutput:
    """Logits [B,T,vocabulary] in float32 and what each layer's router did."""

    logits: Tensor
    layers: list[LayerRouting]


@dataclass(frozen=True)
class TokenLosses:
    """Loss per token in nats, float32 [B,T], and whether the likeliest token was the target, bool [B,T].

    ``layers``: what each layer's router did, where a model has computed the losses.
    """

    loss: Tensor
    right: Tensor
    layers: list[LayerRouting] = field(default_factory=list)


class Block(nn.Module):
    """Pre-norm residual block: mixer, then SwiGLU."""

    def __init__(self, config: ModelConfig, kind: Op) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.width, config.norm_eps)
        self.mixer = RoutedMixer(config, kind)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = SwiGLU(config.width, config.mlp_width, len(config.layers))

    def forward(self, x: Tensor, context: LayerContext) -> tuple[Tensor, LayerRouting]:
        y, routing = self.mixer(self.mixer_norm(x), context)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), routing


class RoutedLM(nn.Module):
    """Language model over ``config.layers``; ``calibration`` [layers,R,P] turns budgets into thresholds (NaN: none).

    ``precision``: what it computes in, set by whoever trains or loads it; the weights are float32 in both.
    """

    calibration: Tensor

    def __init__(self, config: ModelConfig, calibration_points: int = 65) -> None:
        super().__init__()
        self.config = config
        self.precision = Precision.float32
        self.kinds: list[Op] = list(config.layers)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        nn.init.normal_(self.embed.weight, std=config.width**-0.5)
        self.blocks = nn.ModuleList(Block(config, kind) for kind in self.kinds)
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.width, config.vocab_size, bias=False)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=config.width**-0.5)
        table = torch.full((len(self.kinds), config.heads, calibration_points), math.nan)
        self.register_buffer("calibration", table)
        self._calibrated: tuple[Tensor, int, list[bool]] | None = None

    def forward(
        self,
        tokens: Tensor,
        policy: RoutingPolicy | Sequence[RoutingPolicy],
        *,
        attention_mask: Tensor | None = None,
        routes: Sequence[Tensor | None] | None = None,
        training: SupernetConfig | None = None,
    ) -> LMOutput:
        """Next-token logits under a policy.

        tokens [B,T] int64. ``policy``: one for the whole batch, or several, each for an equal consecutive slice of
        it. ``attention_mask`` [B,T], true on real tokens, padding on the left, the right or both sides: real tokens
        get the logits of the unpadded sequence, logits of padding are unspecified. ``routes``: per layer None or
        fixed routes [B,N,R] instead of the router's. ``training``: budgets are exact quantiles of the slice (not
        causal: only for training and calibration) and routes carry the router's gradient.

        Raises ``ValueError`` if a policy does not fit the model, a token is not in the vocabulary, the batch does not
        split, the mask has holes, or a layer without calibration gets a budget.
        """
        policies = self._check(tokens, policy, routes)
        lengths = order = None
        if attention_mask is not None:
            tokens, lengths, order = _pack_right(tokens, attention_mask)
        if training is None:
            self._check_calibration(policies, routes)
        with self._autocast(tokens.device):
            x, layers = self._hidden(tokens, policies, lengths, routes, training)
            logits = F.linear(x, self._output_weight()).float()
        if order is not None:
            logits = torch.empty_like(logits).scatter_(1, order[..., None].expand_as(logits), logits)
        return LMOutput(logits, layers)

    def token_losses(
        self,
        tokens: Tensor,
        policy: RoutingPolicy | Sequence[RoutingPolicy],
        targets: Tensor,
        training: SupernetConfig | None = None,
        routes: Sequence[Tensor | None] | None = None,
    ) -> TokenLosses:
        """Cross-entropy of every token against ``targets`` [B,T] (−100: not scored) without keeping the logits.

        The other arguments and the errors are those of ``forward``.
        """
        policies = self._check(tokens, policy, routes)
        if training is None:
            self._check_calibration(policies, routes)
        with self._autocast(tokens.device):
            x, layers = self._hidden(tokens, policies, None, routes, training)
            return TokenLosses(*linear_cross_entropy(x, self._output_weight(), targets), layers)

    def routing(
        self,
        tokens: Tensor,
        policy: RoutingPolicy | Sequence[RoutingPolicy],
        training: SupernetConfig | None = None,
    ) -> list[LayerRouting]:
        """What each layer's router does with ``tokens``, without computing logits.

        The arguments and the errors are those of ``forward``.
        """
        policies = self._check(tokens, policy, None)
        if training is None:
            self._check_calibration(policies, None)
        with self._autocast(tokens.device):
            return self._hidden(tokens, policies, None, None, training)[1]

    def _check(
        self,
        tokens: Tensor,
        policy: RoutingPolicy | Sequence[RoutingPolicy],
        routes: Sequence[Tensor | None] | None,
    ) -> list[RoutingPolicy]:
        if tokens.dim() != 2 or 0 in tokens.shape or tokens.dtype not in (torch.int32, torch.int64):
            form = f"{tokens.dtype} {tuple(tokens.shape)}"
            raise ValueError(f"tokens must be integers [batch ≥ 1, tokens ≥ 1], found {form}")
        # only where looking costs no synchronisation; on a GPU the embedding's own assertion stops the kernel
        if tokens.device.type == "cpu" and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.config.vocab_size:
            span = f"{int(tokens.min())} to {int(tokens.max())}"
            raise ValueError(f"tokens are {span}: they must lie in [0, {self.config.vocab_size})")
        policies = [policy] if isinstance(policy, RoutingPolicy) else list(policy)
        if not policies or tokens.shape[0] % len(policies):
            raise ValueError(f"a batch of {tokens.shape[0]} does not split into {len(policies)} equal policies")
        for p in policies:
            p.check(self.kinds, self.config.chunk_size)
        if routes is not None and len(routes) != len(self.kinds):
            raise ValueError(f"routes has {len(routes)} entries for {len(self.kinds)} layers")
        return policies

    def _check_calibration(self, policies: Sequence[RoutingPolicy], routes: Sequence[Tensor | None] | None) -> None:
        """Refuse a budget for a layer without a table. The table is looked at once, unless it has changed."""
        budgeted = [
            i
            for i in range(len(self.kinds))
            if (routes is None or routes[i] is None) and any(0 < (p.layers[i].budget or 0) < 1 for p in policies)
        ]
        if not budgeted:
            return
        table = self.calibration
        version = 0 if table.is_inference() else table._version  # an inference tensor has no version
        if self._calibrated is None or self._calibrated[0] is not table or self._calibrated[1] != version:
            self._calibrated = (table, version, (~table.isnan().any(2).any(1)).tolist())
        if not all(self._calibrated[2][i] for i in budgeted):
            raise ValueError("the model is not calibrated: budgets need a calibration table, thresholds do not")

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        if self.precision is Precision.float32:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def _output_weight(self) -> Tensor:
        return self.embed.weight if self.head is None else self.head.weight

    def _hidden(
        self,
        tokens: Tensor,
        policies: Sequence[RoutingPolicy],
        lengths: Tensor | None,
        routes: Sequence[Tensor | None] | None,
        training: SupernetConfig | None,
    ) -> tuple[Tensor, list[LayerRouting]]:
        """What the output layer reads, [B,T,D], and what each layer's router did."""
        x = self.embed(tokens) * math.sqrt(self.config.width)
        if self.precision is Precision.bfloat16:
            x = x.bfloat16()
        layers = []
        for i, block in enumerate(self.blocks):
            context = LayerContext(
                policies=[p.layers[i] for p in policies],
                lengths=lengths,
                calibration=self.calibration[i],
                route=None if routes is None else routes[i],
                training=training,
            )
            x, routing = block(x, context)
            layers.append(routing)
        return self.norm(x), layers


def _pack_right(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Roll each row so that its real tokens come first: (tokens, lengths [B], source index of each position [B,T])."""
    if mask.shape != tokens.shape:
        raise ValueError(f"attention_mask {tuple(mask.shape)} must have the shape of tokens {tuple(tokens.shape)}")
    mask = mask.bool()
    T = tokens.shape[1]
    lengths = mask.sum(1)
    start = mask.int().argmax(1)
    order = (torch.arange(T, device=tokens.device)[None] + start[:, None]) % T
    packed = mask.gather(1, order)
    if bool((packed != (torch.arange(T, device=tokens.device)[None] < lengths[:, None])).any()):
        raise ValueError("attention_mask has holes: the real tokens of a row must be contiguous")
    return tokens.gather(1, order), lengths, order


def count_parameters(model: nn.Module) -> int:
    """Number of trainable scalars."""
    return sum(p.numel() for p in model.parameters())
