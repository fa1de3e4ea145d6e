"""A decoder-only language model whose layers hold two memories; the routing policy is an argument of ``forward``.

Shapes: B batch, T tokens, D width, N chunks, R routing heads.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natsl.calibration import Calibration, upgraded
from natsl.compiled import CompiledPolicy, Fit, compile_policies
from natsl.config import ModelConfig, Precision, SupernetConfig
from natsl.mixer import RoutedMixer
from natsl.modules import RMSNorm, SwiGLU, linear_cross_entropy
from natsl.router import LayerContext, LayerRouting, RoutePair
from natsl.space.policy import Op, RoutingPolicy

Policies: TypeAlias = RoutingPolicy | Sequence[RoutingPolicy]
Routes: TypeAlias = Sequence[Tensor | RoutePair | None]  # per layer


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
    """Language model over ``config.layers``; ``calibration`` turns budgets into thresholds.

    ``precision``: what it computes in, set by whoever trains or loads it; the weights are float32 in both.
    """

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
        self.calibration = Calibration(len(self.kinds), config.heads, calibration_points)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module. Called on the model itself, it also takes states from before a calibration had levels."""
        return super().load_state_dict(upgraded(state_dict), strict, assign)

    def compile_policy(
        self,
        policy: Policies,
        batch: int,
        routes: Routes | None = None,
        *,
        per_kind: bool = True,
        training: bool = False,
    ) -> CompiledPolicy:
        """Compile policies for a batch of this size (see ``natsl.compiled``); ``forward`` takes the result too.

        ``policy`` and ``routes`` as in ``forward``, with its errors: a layer with fixed routes needs no calibration,
        nor does ``training``.
        """
        policies = [policy] if isinstance(policy, RoutingPolicy) else list(policy)
        if not policies or batch % len(policies):
            raise ValueError(f"a batch of {batch} does not split into {len(policies)} equal policies")
        for p in policies:
            p.check(self.kinds, self.config.chunk_size, self.config.heads)
        layers = range(len(self.kinds))
        unchecked = [i for i in layers if training or (routes is not None and routes[i] is not None)]
        self.calibration.check(policies, [i for i in layers if i not in unchecked])
        return compile_policies(policies, self.kinds, self.config.heads, self.calibration, batch, per_kind, unchecked)

    def forward(
        self,
        tokens: Tensor,
        policy: Policies | CompiledPolicy,
        *,
        attention_mask: Tensor | None = None,
        routes: Routes | None = None,
        training: SupernetConfig | None = None,
    ) -> LMOutput:
        """Next-token logits under a policy.

        tokens [B,T] int64. ``policy``: one for the whole batch, or several, each for an equal consecutive slice of
        it, or what ``compile_policy`` has made of them. ``attention_mask`` [B,T], true on real tokens, padding on the
        left, the right or both sides: real tokens get the logits of the unpadded sequence, logits of padding are
        unspecified. ``routes``: per layer None or fixed routes [B,N,R] instead of the router's, one for both memories
        or a ``RoutePair``. ``training``: budgets are exact quantiles of the slice (not causal: only for training and
        calibration) and routes carry the router's gradient.

        Raises ``ValueError`` if a policy does not fit the model, a token is not in the vocabulary, the batch does not
        split, the mask has holes, or a layer without calibration gets a budget.
        """
        compiled = self._compiled(tokens, policy, routes, training)
        lengths = order = None
        if attention_mask is not None:
            tokens, lengths, order = _pack_right(tokens, attention_mask)
        with self._autocast(tokens.device):
            x, layers = self._hidden(tokens, compiled, lengths, routes, training)
            logits = F.linear(x, self._output_weight()).float()
        if order is not None:
            logits = torch.empty_like(logits).scatter_(1, order[..., None].expand_as(logits), logits)
        return LMOutput(logits, layers)

    def token_losses(
        self,
        tokens: Tensor,
        policy: Policies | CompiledPolicy,
        targets: Tensor,
        training: SupernetConfig | None = None,
        routes: Routes | None = None,
    ) -> TokenLosses:
        """Cross-entropy of every token against ``targets`` [B,T] (−100: not scored) without keeping the logits.

        The other arguments and the errors are those of ``forward``.
        """
        compiled = self._compiled(tokens, policy, routes, training)
        with self._autocast(tokens.device):
            x, layers = self._hidden(tokens, compiled, None, routes, training)
            return TokenLosses(*linear_cross_entropy(x, self._output_weight(), targets), layers)

    def routing(
        self,
        tokens: Tensor,
        policy: Policies | CompiledPolicy,
        training: SupernetConfig | None = None,
    ) -> list[LayerRouting]:
        """What each layer's router does with ``tokens``, without computing logits.

        The arguments and the errors are those of ``forward``.
        """
        compiled = self._compiled(tokens, policy, None, training)
        with self._autocast(tokens.device):
            return self._hidden(tokens, compiled, None, None, training)[1]

    def _compiled(
        self,
        tokens: Tensor,
        policy: Policies | CompiledPolicy,
        routes: Routes | None,
        training: SupernetConfig | None,
    ) -> CompiledPolicy:
        if tokens.dim() != 2 or 0 in tokens.shape or tokens.dtype not in (torch.int32, torch.int64):
            form = f"{tokens.dtype} {tuple(tokens.shape)}"
            raise ValueError(f"tokens must be integers [batch ≥ 1, tokens ≥ 1], found {form}")
        # only where looking costs no synchronisation; on a GPU the embedding's own assertion stops the kernel
        if tokens.device.type == "cpu" and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.config.vocab_size:
            span = f"{int(tokens.min())} to {int(tokens.max())}"
            raise ValueError(f"tokens are {span}: they must lie in [0, {self.config.vocab_size})")
        if routes is not None and len(routes) != len(self.kinds):
            raise ValueError(f"routes has {len(routes)} entries for {len(self.kinds)} layers")
        if not isinstance(policy, CompiledPolicy):
            return self.compile_policy(policy, tokens.shape[0], routes, training=training is not None)
        fixed = [routes is not None and routes[i] is not None for i in range(len(self.kinds))]
        fit = Fit(tuple(self.kinds), self.config.heads, self.config.chunk_size)
        policy.check(fit, tokens.shape[0], training is not None, fixed)
        return policy

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        if self.precision is Precision.float32:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def _output_weight(self) -> Tensor:
        return self.embed.weight if self.head is None else self.head.weight

    def _hidden(
        self,
        tokens: Tensor,
        policy: CompiledPolicy,
        lengths: Tensor | None,
        routes: Routes | None,
        training: SupernetConfig | None,
    ) -> tuple[Tensor, list[LayerRouting]]:
        """What the output layer reads, [B,T,D], and what each layer's router did."""
        x = self.embed(tokens) * math.sqrt(self.config.width)
        if self.precision is Precision.bfloat16:
            x = x.bfloat16()
        layers = []
        for i, block in enumerate(self.blocks):
            context = LayerContext(
                policy=policy.layer(i),
                lengths=lengths,
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
