"""Single tokens of a batch, one after another, from a cache: what ``RoutedLM.forward`` does with them, in few launches.

Shapes: B batch, D width, R routing heads, Hs softmax heads, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natsl.cache import Cache, LayerCache
from natsl.calibration import Calibration
from natsl.compiled import CompiledPolicy
from natsl.kernels.decode import LIMITS, DecodePolicy, DecodeState, DecodeWeights, decode_step
from natsl.kernels.dispatch import resolve
from natsl.kernels.rows import rows_linear
from natsl.mixer import BIAS_GAIN, RoutedMixer, rotation_rates
from natsl.model import Block, Policies, RoutedLM
from natsl.modules import RMSNorm, SwiGLU
from natsl.router import Router
from natsl.space.policy import Op

WARM_UP = 3  # steps before a graph is recorded: kernels are compiled and handles made in the first


_MODULES = (RoutedLM, Block, RoutedMixer, Router, Calibration, RMSNorm, SwiGLU, nn.Linear, nn.Embedding, nn.ModuleList)


class _Layer(NamedTuple):
    """The weights of a block as the steps read them, copies, in the dtype that the model computes in."""

    mixer_norm: Tensor
    inputs: Tensor  # of one product: q, k, v, the output's gate, the delta rule's two gates
    weights: DecodeWeights
    output: Tensor
    mlp_norm: Tensor
    mlp_in: Tensor
    mlp_out: Tensor


class StepWeights:
    """Copies of a model's weights as ``Decoder`` reads them, which several decoders may share.

    What changes in the model later is not seen.
    """

    @torch.no_grad()
    def __init__(self, model: RoutedLM) -> None:
        weight = model.embed.weight
        self.embedding = _copy(weight)
        self.layers = [_prepared(cast(Block, block), model.dtype) for block in model.blocks]
        self.norm = _copy(model.norm.weight)
        self.head = _copy(weight if model.head is None else model.head.weight, model.dtype)
        self._sources = (*model.parameters(), *model.buffers())
        self._versions = _versions(self._sources)

    def are_current(self) -> bool:
        """Whether torch has counted no change of the weights; fused optimisers and ``.data`` make some uncounted."""
        return _versions(self._sources) == self._versions


class Decoder:
    """A model that goes on from a cache token by token, under one policy for all rows or several for equal slices.

    ``step`` gives what ``RoutedLM.forward`` gives for one token of every row, but for rounding; both may go on from the
    same cache in turn. ``weights``: copies to share (None: new ones). On CUDA (``graph``, None: there) the steps are
    replayed as a graph, which is recorded anew after another call has used the cache and where the cache needs larger
    tensors: its pages then grow by a fourth. ``ValueError`` for a model that ``decode_step`` does not take
    (``step_limit``), and for a policy or a cache that does not fit.
    """

    def __init__(
        self,
        model: RoutedLM,
        policy: Policies,
        cache: Cache,
        graph: bool | None = None,
        weights: StepWeights | None = None,
    ) -> None:
        batch, c, device = len(cache.lengths), model.config, model.embed.weight.device
        cache.check(c, batch, device, model.dtype)
        reason = step_limit(model, batch)
        if reason is not None:
            raise ValueError(f"decode_step: {reason}")
        resolve("triton", "decode_step", device)
        self._model, self._cache = model, cache
        with self._inference():
            self._weights = StepWeights(model) if weights is None else weights
            self._tokens = torch.zeros(batch, dtype=torch.int64, device=device)
            self._live = torch.ones(batch, dtype=torch.bool, device=device)
            self._compiled = self._compile(policy)
            self._policies = [_copied(part) for part in self._parts()]
        self._logits: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._uses_graph = device.type == "cuda" if graph is None else graph
        self._recorded: list[object] = []  # the parts of the cache that the graph reads
        self._steps = 0

    @property
    def cache(self) -> Cache:
        """The one that it goes on from."""
        return self._cache

    @property
    def weights(self) -> StepWeights:
        """The copies that it reads."""
        return self._weights

    def set_policy(self, policy: Policies) -> None:
        """Take another policy, for the chunks that end in the steps to come; those that are decided stay as they are.

        ``ValueError`` for one that does not fit.
        """
        with self._inference():
            self._compiled = self._compile(policy)
            for own, other in zip(self._policies, self._parts(), strict=True):
                for x, y in zip(own, other, strict=True):
                    x.copy_(y)  # a graph reads it where it is

    def step(self, tokens: Tensor, live: Tensor | None = None) -> Tensor:
        """Read one more token of every row, int64 [B]: logits [B,V] of the one after it, overwritten by the next step.

        ``live`` bool [B]: the rows that have a token (None: all); the others stay as they are and get any logits. Waits
        for the device once in a chunk at most, to see whether the cache is large enough. ``ValueError`` for tokens that
        do not fit and a cache that is unusable; on a GPU ids outside the vocabulary are not looked for.
        """
        cache, c = self._cache, self._model.config
        cache.check(c, len(self._tokens), self._tokens.device, self._model.dtype)
        for name, x, own in (("tokens", tokens, self._tokens), ("live", live, self._live)):
            if x is not None and (x.shape != own.shape or x.dtype != own.dtype):
                form = f"{x.dtype} {tuple(x.shape)}"
                raise ValueError(f"{name} must be {own.dtype} {tuple(own.shape)}, found {form}")
        if tokens.device.type == "cpu" and not 0 <= int(tokens.min()) <= int(tokens.max()) < c.vocab_size:
            raise ValueError(f"tokens = {tokens.tolist()} must lie in [0, {c.vocab_size})")
        with self._inference():
            self._tokens.copy_(tokens)
            self._live.fill_(True) if live is None else self._live.copy_(live)
            cache.expect(self._compiled, 1)
            with cache.advancing(None):
                for layer in cache.layers:
                    layer.reserve(c.chunk_size)
                if self._uses_graph:
                    self._replay()
                else:
                    self._logits = self._compute()
        assert self._logits is not None
        return self._logits

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        """Without gradients, on the model's device, and with tensors that any later call may use."""
        device = self._model.embed.weight.device
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            if device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))
            yield

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
            self._graph, self._recorded = self._record(), parts
        self._graph.replay()

    def _record(self) -> torch.cuda.CUDAGraph:
        """The step as a graph, recorded and not run."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):  # else the one of whichever device was the first
            self._logits = self._compute()
        return graph

    def _compute(self) -> Tensor:
        c, cache, dtype = self._model.config, self._cache, self._model.dtype
        x = (F.embedding(self._tokens, self._weights.embedding) * math.sqrt(c.width)).to(dtype)
        for layer, state, policy in zip(self._weights.layers, cache.layers, self._policies, strict=True):
            inputs, h = rows_linear(x, layer.inputs, norm=layer.mixer_norm, eps=c.norm_eps, want_normed=True)
            y = decode_step(
                h,
                inputs,
                layer.weights,
                _state(state, cache.lengths, self._live),
                policy=policy,
                heads=c.heads,
                softmax_per_head=c.softmax_per_head,
                chunk_size=c.chunk_size,
                eps=c.norm_eps,
            )
            x, _ = rows_linear(y, layer.output, residual=x)
            z, _ = rows_linear(x, layer.mlp_in, norm=layer.mlp_norm, eps=c.norm_eps, gated=True)
            x, _ = rows_linear(z, layer.mlp_out, residual=x)
        cache.lengths += self._live
        return rows_linear(x, self._weights.head, norm=self._weights.norm, eps=c.norm_eps)[0]

    def _compile(self, policy: Policies) -> CompiledPolicy:
        return self._model.compile_policy(policy, len(self._tokens), per_kind=False)

    def _parts(self) -> list[DecodePolicy]:
        layers = (self._compiled.layer(i) for i in range(len(self._weights.layers)))
        return [DecodePolicy(x.threshold, x.cap, x.burst, x.temperature, x.delta_only) for x in layers]


def steps_on(device: torch.device) -> bool:
    """Whether ``Decoder`` is the way to decode there: on a GPU with triton."""
    return device.type == "cuda" and resolve("auto", "decode_step", device) == "triton"


def step_limit(model: RoutedLM, batch: int) -> str | None:
    """Why ``Decoder`` cannot decode so many sequences of a model, None if it can.

    It reads weights and calls no module: one that was replaced, or that has hooks, would not be seen.
    """
    for name, module in model.named_modules():
        changed = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        if changed or type(module) not in _MODULES:
            return f"{name or 'the model'} is a {type(module).__name__} that was replaced or has hooks"
    c = model.config
    sizes = {"K": c.key_dim, "V": c.value_dim, "sequences · softmax heads": batch * c.softmax_heads}
    return LIMITS.reason(model.dtype, c.chunk_size, sizes)


def _versions(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    return [(x.data_ptr(), 0 if x.is_inference() else x._version) for x in tensors]


def _state(layer: LayerCache, read: Tensor, live: Tensor) -> DecodeState:
    return DecodeState(layer.tail, layer.total, layer.delta, layer.pages, read, live)


def _copy(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.detach().to(dtype or x.dtype, copy=True).contiguous()


def _copied(policy: DecodePolicy) -> DecodePolicy:
    """With tensors of its own, which are aligned as views of those of all layers are not."""
    return DecodePolicy(*(x.clone() for x in policy))


def _prepared(block: Block, dtype: torch.dtype) -> _Layer:
    mixer = block.mixer
    projections = [mixer.qkv_proj, mixer.gate_proj]
    if mixer.kind is not Op.softmax:
        projections += [mixer.a_proj, mixer.b_proj]
    return _Layer(
        mixer_norm=_copy(block.mixer_norm.weight),
        inputs=torch.cat([linear.weight for linear in projections]).to(dtype),
        weights=_mixer_weights(mixer, dtype),
        output=_copy(mixer.out_proj.weight, dtype),
        mlp_norm=_copy(block.mlp_norm.weight),
        mlp_in=_copy(block.mlp.in_proj.weight, dtype),
        mlp_out=_copy(block.mlp.out_proj.weight, dtype),
    )


def _mixer_weights(mixer: RoutedMixer, dtype: torch.dtype) -> DecodeWeights:
    c, device = mixer.config, mixer.conv.device
    softmax, delta, routed = mixer.kind is not Op.delta, mixer.kind is not Op.softmax, mixer.kind is Op.routed
    router, router_bias = mixer.router.margin_weights() if routed else (None, None)
    return DecodeWeights(
        conv=_copy(mixer.conv),
        query_norm=_copy(mixer.q_norm.weight) if softmax else None,
        key_norm=_copy(mixer.k_norm.weight) if softmax else None,
        rotation=rotation_rates(c.key_dim // c.softmax_per_head, c.rope_theta, device) if softmax and c.rope else None,
        rate=mixer.A_log.float().exp() if delta else None,
        gate_bias=torch.stack((mixer.dt_bias, mixer.b_proj.bias)).float() if delta else None,
        mix=_copy(mixer.mix_proj.weight, dtype) if routed else None,
        mix_bias=_copy(mixer.mix_proj.bias) if routed else None,
        count_bias=BIAS_GAIN * mixer.mix_bias if routed else None,
        router=router,
        router_bias=router_bias,
        delta_norm=_copy(mixer.delta_norm) if delta else None,
        softmax_norm=_copy(mixer.softmax_norm) if softmax else None,
    )
