"""Single tokens of a batch, one after another, from a cache: what ``RoutedLM.forward`` does with them, in few launches.

Shapes: B batch, D width, R routing heads, Hs softmax heads, V vocabulary.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from natsl.cache import Cache, LayerCache
from natsl.compiled import CompiledLayer, CompiledPolicy
from natsl.kernels.decode import DecodePolicy, DecodeState, DecodeWeights, decode_step
from natsl.mixer import BIAS_GAIN, RoutedMixer
from natsl.model import Block, Policies, RoutedLM
from natsl.modules import rms_norm, swiglu
from natsl.space.policy import Op

WARM_UP = 3  # steps before a graph is recorded: kernels are compiled and handles made in the first


class _Layer(NamedTuple):
    """A block with its weights as the steps read them, in the dtype that the model computes in."""

    block: Block
    inputs: Tensor  # of one product: q, k, v, the output's gate, the delta rule's two gates
    output: Tensor
    mlp_in: Tensor
    mlp_out: Tensor
    weights: DecodeWeights


class Decoder:
    """A model that goes on from a cache token by token, under one policy for all rows or one for each.

    ``step`` gives what ``RoutedLM.forward`` gives for one token of every row, but for rounding; it may be called on the
    same cache in turn with that. The weights are copied when it is made: what changes in the model later is not seen.
    On CUDA the steps are replayed as a graph, which is recorded anew where the cache needs larger tensors: they double
    when it does. ``ValueError`` for what ``decode_step`` does not take, a policy or a cache that does not fit.
    """

    def __init__(self, model: RoutedLM, policy: Policies, cache: Cache, graph: bool | None = None) -> None:
        batch = len(cache.lengths)
        weight = model.embed.weight
        cache.check(model.config, batch, weight.device, model.dtype)
        self._model, self._cache = model, cache
        self._layers = [_prepared(block, model.dtype) for block in model.blocks if isinstance(block, Block)]
        self._embedding = weight.to(model.dtype)
        self._head = self._embedding if model.head is None else model.head.weight.to(model.dtype)
        self._tokens = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        self._live = torch.ones(batch, dtype=torch.bool, device=weight.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._uses_graph = weight.is_cuda if graph is None else graph
        self._logits: Tensor | None = None
        self._recorded: list[object] = []  # the parts of the cache that the graph reads
        self._steps = 0
        self._policy = self._compile(policy)

    def set_policy(self, policy: Policies) -> None:
        """Take another policy, for the chunks that end in the steps to come; those that are decided stay as they are.

        ``ValueError`` for one that does not fit.
        """
        self._policy.copy_(self._compile(policy))  # a graph reads it where it is

    def _compile(self, policy: Policies) -> CompiledPolicy:
        return self._model.compile_policy(policy, len(self._tokens), per_kind=False)

    @torch.no_grad()
    def step(self, tokens: Tensor, live: Tensor | None = None) -> Tensor:
        """Read one more token of every row, int64 [B]: logits [B,V] of the one after it, overwritten by the next step.

        ``live`` bool [B]: the rows that have a token (None: all); the others stay as they are and get any logits. Waits
        for the device once in a chunk at most, to see whether the cache is large enough.
        """
        cache = self._cache
        cache.check(self._model.config, len(self._tokens), self._tokens.device, self._model.dtype)
        self._tokens.copy_(tokens)
        self._live.fill_(True) if live is None else self._live.copy_(live)
        with cache.advancing(None):
            for layer in cache.layers:
                layer.reserve(self._model.config.chunk_size)
            if self._uses_graph:
                self._replay()
            else:
                self._logits = self._compute()
        assert self._logits is not None
        return self._logits

    def _replay(self) -> None:
        parts: list[object] = [self._cache.lengths]
        for layer in self._cache.layers:
            parts += [layer.tail, layer.total, layer.delta, layer.pages]
        if self._graph is None or any(a is not b for a, b in zip(self._recorded, parts, strict=True)):
            self._graph = None
            if self._steps < WARM_UP:
                self._steps += 1
                self._logits = self._compute()
                return
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._logits = self._compute()
            self._graph, self._recorded = graph, parts
        self._graph.replay()

    def _compute(self) -> Tensor:
        model, cache = self._model, self._cache
        c, dtype = model.config, model.dtype
        x = F.embedding(self._tokens, model.embed.weight) * math.sqrt(c.width)
        x = x.to(dtype)
        for i, layer in enumerate(self._layers):
            block = layer.block
            h = rms_norm(x, block.mixer_norm.weight, c.norm_eps)
            y = decode_step(
                h,
                F.linear(h, layer.inputs),
                layer.weights,
                _state(cache.layers[i], cache.lengths, self._live),
                policy=_policy(self._policy.layer(i)),
                heads=c.heads,
                softmax_per_head=c.softmax_per_head,
                chunk_size=c.chunk_size,
                eps=c.norm_eps,
                rope_theta=c.rope_theta if c.rope else None,
            )
            x = x + F.linear(y, layer.output)
            h = rms_norm(x, block.mlp_norm.weight, c.norm_eps)
            x = x + F.linear(swiglu(F.linear(h, layer.mlp_in)), layer.mlp_out)
        cache.lengths += self._live
        return F.linear(rms_norm(x, model.norm.weight, c.norm_eps), self._head)


def _state(layer: LayerCache, read: Tensor, live: Tensor) -> DecodeState:
    return DecodeState(layer.tail, layer.total, layer.delta, layer.pages, read, live)


def _policy(layer: CompiledLayer) -> DecodePolicy:
    return DecodePolicy(layer.threshold, layer.cap, layer.burst, layer.temperature, layer.delta_only)


@torch.no_grad()
def _prepared(block: Block, dtype: torch.dtype) -> _Layer:
    mixer = block.mixer
    projections = [mixer.qkv_proj, mixer.gate_proj]
    if mixer.kind is not Op.softmax:
        projections += [mixer.a_proj, mixer.b_proj]
    return _Layer(
        block,
        torch.cat([linear.weight for linear in projections]).to(dtype),
        mixer.out_proj.weight.to(dtype),
        block.mlp.in_proj.weight.to(dtype),
        block.mlp.out_proj.weight.to(dtype),
        _mixer_weights(mixer, dtype),
    )


def _mixer_weights(mixer: RoutedMixer, dtype: torch.dtype) -> DecodeWeights:
    softmax, delta, routed = mixer.kind is not Op.delta, mixer.kind is not Op.softmax, mixer.kind is Op.routed
    router, router_bias = mixer.router.margin_weights() if routed else (None, None)
    return DecodeWeights(
        conv=mixer.conv,
        query_norm=mixer.q_norm.weight if softmax else None,
        key_norm=mixer.k_norm.weight if softmax else None,
        rate=mixer.A_log.float().exp() if delta else None,
        gate_bias=torch.stack((mixer.dt_bias, mixer.b_proj.bias)).float() if delta else None,
        mix=mixer.mix_proj.weight.to(dtype) if routed else None,
        mix_bias=mixer.mix_proj.bias if routed else None,
        count_bias=BIAS_GAIN * mixer.mix_bias if routed else None,
        router=router,
        router_bias=router_bias,
        delta_norm=mixer.delta_norm if delta else None,
        softmax_norm=mixer.softmax_norm if softmax else None,
    )
