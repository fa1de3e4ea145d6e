"""A decoder-only language model whose layers hold two memories; the routing policy is an argument of ``forward``.

Shapes: B batch, T tokens, D width, N chunks, R routing heads.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natsl.cache import Cache
from natsl.calibration import Calibration, upgraded
from natsl.compiled import CompiledPolicy, Fit, compile_policies, layer_plan
from natsl.config import ModelConfig, Precision, RouteGradient
from natsl.kernels.segment import Split, split, touched_chunks
from natsl.layout import Layout
from natsl.mixer import RoutedMixer
from natsl.modules import RMSNorm, SwiGLU, linear_cross_entropy
from natsl.router import LayerContext, LayerRouting, RoutePair
from natsl.space.policy import Op, RoutingPolicy
from natsl.tasks.sequences import IGNORED
from natsl.tree import PolicyTree, compile_tree

Policies: TypeAlias = RoutingPolicy | Sequence[RoutingPolicy]
Routes: TypeAlias = Sequence[Tensor | RoutePair | None]  # per layer


@dataclass(frozen=True)
class LMOutput:
    """What ``forward`` computed of a batch; what was not wanted is None.

    ``logits`` [B,T or logits_to_keep,vocabulary] in the dtype that the model computes in. ``loss`` per token in nats,
    float32 [B,T], 0 where nothing is scored, and ``right`` bool [B,T]: whether the likeliest token was the target.
    ``layers``: what each layer's router did, padding on the right.
    """

    logits: Tensor | None
    loss: Tensor | None
    right: Tensor | None
    layers: list[LayerRouting]


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

    ``precision``: what it computes in; the weights are float32 in both.
    """

    def __init__(
        self, config: ModelConfig, calibration_points: int = 65, precision: Precision = Precision.float32
    ) -> None:
        super().__init__()
        self.config = config
        self._precision = precision
        self.kinds: list[Op] = list(config.layers)
        # Of an export, whose layers lose what their policy does not use: the kinds before that, which scores count by.
        self.supernet_kinds = self.kinds
        self.embed = nn.Embedding(config.vocab_size, config.width)
        nn.init.normal_(self.embed.weight, std=config.width**-0.5)
        self.blocks = nn.ModuleList(Block(config, kind) for kind in self.kinds)
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.width, config.vocab_size, bias=False)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=config.width**-0.5)
        self.calibration = Calibration(len(self.kinds), config.heads, calibration_points)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module. Called on the model itself, it also takes states of older versions.

        Those from before a calibration had levels, and from before the mix had a bias, which is then 0.
        """
        state = upgraded(state_dict)
        for name, bias in state_dict.items():
            if name.endswith(".mix_proj.bias"):
                state.setdefault(name.replace("mix_proj.bias", "mix_bias"), torch.zeros_like(bias))
        return super().load_state_dict(state, strict, assign)

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
        policies = [policy] if isinstance(policy, RoutingPolicy | str) else list(policy)
        for p in policies:
            if not isinstance(p, RoutingPolicy):
                raise ValueError(f"policy = {p!r} is a {type(p).__name__}: it must be a RoutingPolicy, or several")
        if not policies or batch % len(policies):
            raise ValueError(f"a batch of {batch} does not split into {len(policies)} equal policies")
        for p in policies:
            p.check(self.kinds, self.config.chunk_size, self.config.heads)
        layers = range(len(self.kinds))
        unchecked = [i for i in layers if training or (routes is not None and routes[i] is not None)]
        self.calibration.check(policies, [i for i in layers if i not in unchecked])
        return compile_policies(policies, self.kinds, self.config.heads, self.calibration, batch, per_kind, unchecked)

    def compile_tree(self, policies: Sequence[RoutingPolicy], sequences: int) -> PolicyTree:
        """Compile distinct policies that all see the same sequences, so many; ``forward`` takes the result.

        Layers that several policies begin with are computed once for all of them: policies in the order of their first
        layers share most. ``ValueError`` if a policy does not fit, comes twice or needs a calibration that is missing.
        """
        return compile_tree(policies, self.compile_policy(policies, len(policies)), sequences)

    def forward(
        self,
        tokens: Tensor,
        policy: Policies | CompiledPolicy | PolicyTree,
        *,
        targets: Tensor | None = None,
        layout: Layout | None = None,
        cache: Cache | None = None,
        routes: Routes | None = None,
        route_gradient: RouteGradient | None = None,
        logits_to_keep: int | None = None,
    ) -> LMOutput:
        """Next-token logits or losses under a policy: the one way into the model.

        tokens [B,T] int64. ``policy``: one for all sequences, or several, each for an equal consecutive slice of them,
        or what ``compile_policy`` has made of them; under what ``compile_tree`` has made of several, every sequence is
        computed with each, and the result has a row for every policy and sequence. ``targets`` [B,T] int64, the token
        that follows each (−100, and padding: not scored): the losses are computed without keeping the logits.
        ``layout``: padding, or sequences packed into a batch of one row; real tokens get what they get in their
        sequence alone, padding gets something unspecified. ``cache`` (inference only): the sequences go on from what it
        holds, and it is updated; the policy may change between calls, but a decided chunk keeps its route. ``routes``:
        per layer None or fixed routes [B,N,R] instead of the router's, one for both memories or a ``RoutePair``. With a
        cache all routing is of the N = ``touched_chunks(T, C)`` chunks from each sequence's open one on.
        ``route_gradient`` (training and calibration): budgets are exact quantiles of their slice, under data
        parallelism of each rank's (not causal), and routes carry the router's gradient. ``logits_to_keep`` ≤ T: logits
        of only the last so many real tokens of each sequence, [S,·,vocabulary], anything in the first places of a
        shorter one (None: of all tokens, or none with targets).

        In training, parameters that have no influence under the policy get zeros as gradients. Raises ``ValueError`` if
        a policy, the layout or the cache does not fit, a token is not in the vocabulary, the sequences do not split, or
        a layer without calibration gets a budget.
        """
        layout = Layout() if layout is None else layout
        self._check(tokens, targets, layout, cache, logits_to_keep)
        sequences = tokens.shape[0] if layout.lengths is None else layout.lengths.shape[0]
        self._check_routes(tokens, layout, cache, routes)
        if isinstance(policy, PolicyTree):
            others = (*vars(layout).values(), cache, routes, route_gradient)
            self._check_tree(policy, sequences, all(x is None for x in others))
            targets = None if targets is None else targets.repeat(policy.policies, 1)
            compiled: CompiledPolicy | PolicyTree = policy
        else:
            compiled = self._compiled(sequences, policy, routes, route_gradient is not None)
        with contextlib.ExitStack() as stack:
            if cache is not None:
                if route_gradient is not None:
                    raise ValueError("a cache is for inference: route_gradient must be None")
                if layout.packing is not None:
                    raise ValueError("a cache goes on with rows, not with packed sequences: give them as padded rows")
                cache.check(self.config, sequences, tokens.device, self.dtype)
                assert isinstance(compiled, CompiledPolicy)
                cache.expect(compiled, tokens.shape[1], fixed=routes is not None)
                start, parts = cache.lengths % self.config.chunk_size, self._parts(tokens, layout, cache)
                layout = replace(layout, read=cache.lengths, start=start, parts=parts)
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
                stack.enter_context(cache.advancing(tokens.shape[1] if layout.lengths is None else layout.lengths))
            stack.enter_context(self._autocast(tokens.device))
            ids = layout.to_right(tokens)
            x, layers = self._hidden(ids, compiled, layout, cache, routes, route_gradient)
            loss = right = logits = None
            if targets is not None:
                losses = linear_cross_entropy(x, self._output_weight(), layout.scored(targets, IGNORED), IGNORED)
                loss, right = map(layout.restore, losses)
            if logits_to_keep is None and targets is None:
                logits = layout.restore(F.linear(x, self._output_weight()))
            elif logits_to_keep:
                logits = F.linear(layout.last(x, logits_to_keep), self._output_weight())
            if cache is not None and cache.recording is not None:
                assert layout.read is not None
                assert not isinstance(policy, PolicyTree)
                made = [RoutePair(layer.route, layer.skip) for layer in layers]
                cache.recording.add(ids, layout.lengths, layout.read, policy, made)
        return LMOutput(logits, loss, right, layers)

    def freeze_unused(self, policy: RoutingPolicy) -> None:
        """Freeze what training for one policy must leave as it is, for good.

        That is what has no influence under it, and the routers of layers with thresholds of their own: a budget is held
        in training, but what a threshold keeps would follow its router.
        """
        for block, kind, layer in zip(self.blocks, self.kinds, policy.layers, strict=True):
            assert isinstance(block, Block)
            for parameter in block.mixer.unused(layer_plan([layer], kind, 1).spans, layer.needs_calibration()):
                parameter.requires_grad_(False)

    def new_cache(self, batch: int, policy: Policies | None = None, max_tokens: int | None = None) -> Cache:
        """A cache for ``forward`` of ``batch`` sequences that have no tokens yet.

        With a ``policy`` and ``max_tokens`` it takes at once the memory that so many tokens of each may need under this
        policy (``Cache.reserve``): with caps or thresholds that keep nothing that is a hard bound, for any input.
        ``ValueError`` for one without the other.
        """
        if (policy is None) != (max_tokens is None):
            raise ValueError(f"policy and max_tokens = {max_tokens} belong together: give both or none")
        with torch.inference_mode(False):  # else no call outside it could use the cache
            cache = Cache(self.config, batch, self.embed.weight.device, self.dtype)
            if policy is not None and max_tokens is not None:
                cache.reserve(self.compile_policy(policy, batch), max_tokens)
        return cache

    @property
    def dtype(self) -> torch.dtype:
        """Of the residual stream, and of what a cache holds of it."""
        return torch.bfloat16 if self.precision is Precision.bfloat16 else self.embed.weight.dtype

    @property
    def precision(self) -> Precision:
        """What the model computes in."""
        return self._precision

    def _check(
        self, tokens: Tensor, targets: Tensor | None, layout: Layout, cache: Cache | None, logits_to_keep: int | None
    ) -> None:
        if tokens.dim() != 2 or 0 in tokens.shape or tokens.dtype not in (torch.int32, torch.int64):
            form = f"{tokens.dtype} {tuple(tokens.shape)}"
            raise ValueError(f"tokens must be integers [batch ≥ 1, tokens ≥ 1], found {form}")
        # only where looking costs no synchronisation; on a GPU the embedding's own assertion stops the kernel
        if tokens.device.type == "cpu" and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.config.vocab_size:
            span = f"{int(tokens.min())} to {int(tokens.max())}"
            raise ValueError(f"tokens are {span}: they must lie in [0, {self.config.vocab_size})")
        if targets is not None and (targets.shape != tokens.shape or targets.dtype is not torch.int64):
            form = f"{targets.dtype} {tuple(targets.shape)}"
            raise ValueError(f"targets must be int64 {tuple(tokens.shape)}, as tokens are, found {form}")
        if logits_to_keep is not None and not 0 <= logits_to_keep <= tokens.shape[1]:
            raise ValueError(
                f"logits_to_keep = {logits_to_keep} must lie in [0, {tokens.shape[1]}], the tokens of a row"
            )
        layout.check(tokens, self.config.chunk_size)
        if cache is None and layout.read is not None:
            raise ValueError("layout.read is set from a cache, and there is none")

    def _parts(self, tokens: Tensor, layout: Layout, cache: Cache) -> Split | None:
        """Where the tokens of a call are in their chunks, for kernels; waits for the device."""
        (B, T), C = tokens.shape, self.config.chunk_size
        if not tokens.is_cuda or T == 1:
            return None
        start = [read % C for read in cache.lengths.tolist()]
        return split(start, [T] * B if layout.lengths is None else layout.lengths.tolist(), T, C, tokens.device)

    def _check_routes(self, tokens: Tensor, layout: Layout, cache: Cache | None, routes: Routes | None) -> None:
        if routes is None:
            return
        if len(routes) != len(self.kinds):
            raise ValueError(f"routes has {len(routes)} entries for {len(self.kinds)} layers")
        (B, T), C = tokens.shape, self.config.chunk_size
        chunks = -(-T // C) if cache is None else touched_chunks(T, C)
        expected = (B, chunks if layout.packing is None else len(layout.packing.size), self.config.heads)
        for i, route in enumerate(routes):
            for x in (route.keep, route.skip) if isinstance(route, RoutePair) else (route,):
                if x is not None and tuple(x.shape) != expected:
                    raise ValueError(f"routes[{i}]: route has shape {tuple(x.shape)}, expected {expected}")

    def _check_tree(self, tree: PolicyTree, sequences: int, plain: bool) -> None:
        fit = self._fit()
        if tree.fit != fit:
            raise ValueError(f"the tree was compiled for another model: {tree.fit}, not {fit}")
        if tree.sequences != sequences:
            raise ValueError(f"the tree was compiled for {tree.sequences} sequences, not {sequences}")
        if not plain:
            raise ValueError("a tree of policies goes with neither a layout, a cache, fixed routes nor a gradient")

    def _fit(self) -> Fit:
        return Fit(tuple(self.kinds), self.config.heads, self.config.chunk_size)

    def _compiled(
        self, sequences: int, policy: Policies | CompiledPolicy, routes: Routes | None, training: bool
    ) -> CompiledPolicy:
        if not isinstance(policy, CompiledPolicy):
            return self.compile_policy(policy, sequences, routes, training=training)
        fixed = [routes is not None and routes[i] is not None for i in range(len(self.kinds))]
        policy.check(self._fit(), sequences, training, fixed)
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
        policy: CompiledPolicy | PolicyTree,
        layout: Layout,
        cache: Cache | None,
        routes: Routes | None,
        gradient: RouteGradient | None,
    ) -> tuple[Tensor, list[LayerRouting]]:
        """What the output layer reads, [B,T,D], and what each layer's router did; padding is on the right."""
        x = self.embed(tokens) * math.sqrt(self.config.width)
        if self.precision is Precision.bfloat16:
            x = x.bfloat16()
        layers = []
        for i, block in enumerate(self.blocks):
            route, state = None if routes is None else routes[i], None if cache is None else cache.layers[i]
            if isinstance(policy, PolicyTree):
                x = policy.branch(i, x)
            x, routing = block(x, LayerContext(policy.layer(i), layout, state, route, gradient))
            layers.append(policy.expand(i, routing) if isinstance(policy, PolicyTree) else routing)
        return self.norm(x), layers


def count_parameters(model: nn.Module) -> int:
    """Number of trainable scalars."""
    return sum(p.numel() for p in model.parameters())
