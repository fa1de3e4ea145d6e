"""Speed of inference with a whole model: reading a prompt into a cache, and decoding one token after another from it.

The rival is the same model with softmax attention in every layer and dense keys and values. Shapes: B batch, T tokens,
C chunk size, R routing heads, Hs softmax heads, Ks and Vs their key and value width.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from natsl.cache import Cache
from natsl.decode import Decoder
from natsl.kernels.rows import rows_linear
from natsl.layout import Layout
from natsl.mixer import RoutedMixer
from natsl.model import Block, RoutedLM, count_parameters
from natsl.modules import rms_norm
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from natsl.throughput import ThroughputConfig, median_seconds, peak_gib

if TYPE_CHECKING:
    from natsl.config import ModelConfig

WARM_UP = 5  # steps of decoding that are not timed: a graph is recorded in them
TOKENS_AT_ONCE = 1 << 17  # of all rows, while a prompt is read


@dataclass(frozen=True)
class ServingSpeed:
    """One way to read prompts or to decode: milliseconds of a pass or of a step, and tokens of all rows per second.

    ``cache_bytes``: of the cache's tensors; ``allocated_bytes``: how much more the device's allocator had given out
    with the cache than without, None where it was not measured.
    """

    model: str
    parameters: int
    step_ms: float
    tokens_per_second: float
    cache_bytes: int | None
    allocated_bytes: int | None
    peak_gib: float | None

    @staticmethod
    def heading() -> str:
        """Names of the columns of ``line``."""
        return f"{'model':<22} {'parameters':>12} {'ms':>9} {'tokens/s':>10} {'cache MiB':>10} {'GiB':>6}"

    def line(self) -> str:
        """One line of a table."""
        cache = "–" if self.cache_bytes is None else f"{self.cache_bytes / 2**20:,.1f}"
        memory = "–" if self.peak_gib is None else f"{self.peak_gib:.1f}"
        return (
            f"{self.model:<22} {self.parameters:>12,} {self.step_ms:>9.2f} {self.tokens_per_second:>10,.0f} "
            f"{cache:>10} {memory:>6}"
        )


def measure_prefill(config: ThroughputConfig, device: torch.device) -> Iterator[ServingSpeed]:
    """Time one pass over the prompts: dense, and routed without and with a cache that it fills, these two in turn."""
    for model, ways in (
        (_dense(config.model), {"dense softmax": False}),
        (config.model, {"routed, no cache": False, "routed, prefill": True}),
    ):
        yield from _prefill_speeds(_build(model, config, device), ways, config, device)


def _prefill_speeds(
    net: RoutedLM, ways: Mapping[str, bool], config: ThroughputConfig, device: torch.device
) -> Iterator[ServingSpeed]:
    """Speeds of a model by name; ``ways``: whether there is a cache."""
    policy, tokens = _policy(net.config, config.budget), _tokens(config, device)

    def read(cached: bool) -> Cache | None:
        cache = net.new_cache(config.batch_size) if cached else None
        net(tokens, policy, cache=cache, logits_to_keep=1)
        return cache

    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for _ in range(2):
            for cached in ways.values():
                read(cached)
        for _ in range(config.steps):  # in turn, as a host that is not alone is slower for a while
            for name, cached in ways.items():
                times[name].append(median_seconds(partial(read, cached), 1, device))
        for name, cached in ways.items():
            seconds, before = statistics.median(times[name]), _allocated(device)
            cache = read(cached)
            after = _allocated(device)
            yield ServingSpeed(
                name,
                count_parameters(net),
                1e3 * seconds,
                config.batch_size * config.tokens / seconds,
                None if cache is None else cache.nbytes,
                None if cache is None or before is None or after is None else after - before,
                peak_gib(device),
            )


def measure_decode(config: ThroughputConfig, device: torch.device) -> Iterator[ServingSpeed]:
    """Time steps that each read the likeliest token of the one before, after ``tokens`` of every row.

    The dense model twice: with torch's attention, and with natsl's steps. One that does not fit in memory is left out.
    """
    for name, model, build in (
        ("dense, torch", _dense(config.model), _dense_steps),
        ("dense, natsl", _dense(config.model), _decoder),
        ("routed", config.model, _decoder),
    ):
        try:
            yield _decode_speed(name, model, build, config, device)
        except torch.OutOfMemoryError:
            continue


def _decode_speed(
    name: str, model: ModelConfig, build: _Build, config: ThroughputConfig, device: torch.device
) -> ServingSpeed:
    net = _build(model, config, device)
    before, on_gpu = _allocated(device), device.type == "cuda"
    with torch.no_grad():
        step, cache, allocated = build(net, config, device)
        token = torch.zeros(config.batch_size, dtype=torch.int64, device=device)

        def advance(steps: int) -> None:
            for _ in range(steps):
                token.copy_(step(token).argmax(-1))
            if on_gpu:
                torch.cuda.synchronize(device)

        advance(WARM_UP)
        start = time.perf_counter()
        advance(config.steps)
        seconds = (time.perf_counter() - start) / config.steps
    more = None if before is None or allocated is None else allocated - before
    return ServingSpeed(
        name, count_parameters(net), 1e3 * seconds, config.batch_size / seconds, cache, more, peak_gib(device)
    )


# Makes steps, tokens [B] → logits [B,V], with the bytes of the cache and what was allocated when it had been filled.
_Build = Callable[[RoutedLM, ThroughputConfig, torch.device], tuple[Callable[[Tensor], Tensor], int, int | None]]


def _dense_steps(
    net: RoutedLM, config: ThroughputConfig, device: torch.device
) -> tuple[Callable[[Tensor], Tensor], int, int | None]:
    steps = DenseSteps(net, config.tokens, config.batch_size)
    return steps.step, steps.nbytes, None


def _decoder(
    net: RoutedLM, config: ThroughputConfig, device: torch.device
) -> tuple[Callable[[Tensor], Tensor], int, int | None]:
    policy, C = _policy(net.config, config.budget), net.config.chunk_size
    cache = net.new_cache(config.batch_size, policy, config.tokens + WARM_UP + config.steps)
    size = max(1, TOKENS_AT_ONCE // config.batch_size // C) * C
    for piece in _tokens(config, device).split(size, 1):
        net(piece, policy, cache=cache, logits_to_keep=1)
    bytes_, allocated = cache.nbytes, _allocated(device)
    if device.type == "cuda":
        return Decoder(net, policy, cache).step, bytes_, allocated
    return lambda token: net(token[:, None], policy, cache=cache).logits[:, 0], bytes_, allocated


class DenseSteps:
    """Steps of a model with softmax attention only, over dense keys and values, by torch's attention.

    Everything around the attention is compiled and, on CUDA, one step is a graph. A step overwrites the last of
    ``tokens`` keys and values, so that it always reads as many.
    """

    def __init__(self, net: RoutedLM, tokens: int, batch: int, seed: int = 0, compiled: bool = True) -> None:
        c, weight = net.config, net.embed.weight
        device, dtype, Hs = weight.device, net.dtype, c.softmax_heads
        random = torch.Generator(device).manual_seed(seed)

        def filled(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype, generator=random)

        self.net, self.blocks = net, [cast(Block, block) for block in net.blocks]
        self.keys = [filled(batch, Hs, tokens, c.key_dim // c.softmax_per_head) for _ in self.blocks]
        self.values = [filled(batch, Hs, tokens, c.value_dim // c.softmax_per_head) for _ in self.blocks]
        self.tails = [filled(batch, c.conv_width - 1, b.mixer.conv.shape[0]) for b in self.blocks]
        self.read = torch.full((batch,), tokens - 1, device=device)
        self.inputs = [
            torch.cat((b.mixer.qkv_proj.weight, b.mixer.gate_proj.weight)).to(dtype).contiguous() for b in self.blocks
        ]
        self.outputs = [b.mixer.out_proj.weight.to(dtype) for b in self.blocks]
        self.mlp = [(b.mlp.in_proj.weight.to(dtype), b.mlp.out_proj.weight.to(dtype)) for b in self.blocks]
        self.head = (weight if net.head is None else net.head.weight).to(dtype)
        self._before = torch.compile(_before, dynamic=False) if compiled else _before
        self._after = torch.compile(_after, dynamic=False) if compiled else _after
        self._tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits = self._compute()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._logits = self._compute()

    def step(self, tokens: Tensor) -> Tensor:
        """Logits [B,V] after ``tokens`` [B]."""
        self._tokens.copy_(tokens)
        if self._graph is None:
            self._logits = self._compute()
        else:
            self._graph.replay()
        return self._logits

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and tails."""
        return sum(x.numel() * x.element_size() for x in (*self.keys, *self.values, *self.tails))

    def _compute(self) -> Tensor:
        c = self.net.config
        x = (F.embedding(self._tokens, self.net.embed.weight) * c.width**0.5).to(self.net.dtype)
        for i, block in enumerate(self.blocks):
            mixer, norms = block.mixer, (block.mixer_norm.weight, block.mlp_norm.weight)
            inputs, _ = rows_linear(x, self.inputs[i], norm=norms[0], eps=c.norm_eps)
            q, k, v, tail = self._before(mixer, inputs, self.tails[i], self.read)
            self.tails[i].copy_(tail)
            self.keys[i][:, :, -1:].copy_(k)
            self.values[i][:, :, -1:].copy_(v)
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH], set_priority=True):
                o = F.scaled_dot_product_attention(q, self.keys[i], self.values[i])
            y = self._after(mixer, o, inputs)
            x, _ = rows_linear(y, self.outputs[i], residual=x)
            z, _ = rows_linear(x, self.mlp[i][0], norm=norms[1], eps=c.norm_eps, gated=True)
            x, _ = rows_linear(z, self.mlp[i][1], residual=x)
        return rows_linear(x, self.head, norm=self.net.norm.weight, eps=c.norm_eps)[0]


def _before(mixer: RoutedMixer, inputs: Tensor, tail: Tensor, read: Tensor) -> tuple[Tensor, ...]:
    """q [B,Hs,1,Ks], k and v of a new token, and the convolution's next tail."""
    window = torch.cat((tail, inputs[:, None, : mixer.conv.shape[0]]), 1)
    y = F.silu((window.float() * mixer.conv.T.float()).sum(1)).to(inputs.dtype)
    q, k, v = mixer.softmax_heads(*mixer.split(y[:, None]), Layout(read=read))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), window[:, 1:]


def _after(mixer: RoutedMixer, o: Tensor, inputs: Tensor) -> Tensor:
    """Gated norm of the attention's outputs o [B,Hs,1,Vs]: [B,R·V]."""
    o = rms_norm(o[:, :, 0], mixer.softmax_norm, mixer.config.norm_eps)
    gate = inputs[:, mixer.conv.shape[0] :].view(o.shape)
    return (F.silu(gate.float()) * o.float()).to(inputs.dtype).flatten(1)


def _dense(model: ModelConfig) -> ModelConfig:
    return replace(model, layers=[Op.softmax] * len(model.layers))


def _build(model: ModelConfig, config: ThroughputConfig, device: torch.device) -> RoutedLM:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(0)
    with device:
        return RoutedLM(model, precision=config.precision).eval()


def _policy(model: ModelConfig, budget: float) -> RoutingPolicy:
    """Every head of every routed layer keeps this share of its chunks, spread evenly: it wants all and has a cap."""
    layer = LayerPolicy(Op.routed, threshold=-1e9, cap=budget)
    return RoutingPolicy.fill(model.layers, model.chunk_size, layer)


def _tokens(config: ThroughputConfig, device: torch.device) -> Tensor:
    random = torch.Generator(device).manual_seed(1)
    shape = (config.batch_size, config.tokens)
    return torch.randint(config.model.vocab_size, shape, device=device, generator=random)


def _allocated(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    gc.collect()
    return torch.cuda.memory_allocated(device)
