"""Speed of a whole model against the same model with dense softmax attention in every layer: here of a training step.

``natsl.serving`` times prefill and decoding.

Both read random tokens in the model's vocabulary and take the same step: forward, backward, clipping, AdamW. The dense
model's attention is torch's SDPA (cuDNN on CUDA). Times are medians over single steps, by the device's clock.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import pairwise
from typing import TYPE_CHECKING

from natsl.config import ModelConfig, Precision, RouteGradient, TrainConfig
from natsl.kernels.bench.roofline import op_work
from natsl.kernels.shape import Case, Shape
from natsl.space.check import check, check_choice, check_counts
from natsl.space.policy import Op, RoutingPolicy

if TYPE_CHECKING:  # torch is imported where it is used, so that --help stays fast
    import torch

PEAK = {"H100 80GB HBM3": 989e12}  # bfloat16 operations per second, dense, as the vendor states them
WARM_UP = 3  # steps that are not timed


class Phase(Enum):
    """What is timed: steps of training, reading prompts into a cache, or decoding token by token after them."""

    train = "train"
    prefill = "prefill"
    decode = "decode"


@dataclass
class ThroughputConfig:
    """Time a whole model and the same model with dense softmax attention in all layers.

    ``phase``: train, prefill or decode. ``batch_size`` sequences of ``tokens`` random tokens, in decode those that come
    before the tokens that are timed; every routed layer keeps ``budget`` of its chunks.
    ``steps`` are timed; results go to ``out``/throughput.json. ``device`` as for training. For training only:
    ``counterfactual_rate``, the share of the chunks left out that the router's gradient samples, and ``compile``,
    torch.compile of each block.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    phase: Phase = Phase.train
    batch_size: int = 8
    tokens: int = 4096
    budget: float = 0.3
    counterfactual_rate: float = 0.1
    precision: Precision = Precision.bfloat16
    compile: bool = False
    steps: int = 10
    device: str = "auto"
    out: str = "runs/throughput"

    def __post_init__(self) -> None:
        self.phase = check_choice("phase", self.phase, Phase)
        self.precision = check_choice("precision", self.precision, Precision)
        check_counts(1, {name: getattr(self, name) for name in ("batch_size", "tokens", "steps")})
        trains = self.phase is Phase.train
        check(trains or not self.compile, "compile", self.compile, f"phase = {self.phase.value} is never compiled")
        check(0 <= self.budget <= 1, "budget", self.budget, "it must lie in [0, 1]")
        check(
            0 < self.counterfactual_rate <= 1, "counterfactual_rate", self.counterfactual_rate, "it must lie in (0, 1]"
        )


@dataclass(frozen=True)
class Speed:
    """One model's step.

    ``flops_per_second`` counts the least operations that the step takes (``step_flops``); its share of the device's
    peak and the largest memory are None where they are not known.
    """

    model: str
    parameters: int
    step_ms: float
    tokens_per_second: float
    flops_per_second: float
    share_of_peak: float | None
    peak_gib: float | None

    @staticmethod
    def heading() -> str:
        """Names of the columns of ``line``."""
        return (
            f"{'model':<22} {'parameters':>12} {'step ms':>9} {'tokens/s':>10} {'TFLOP/s':>8} {'of peak':>8} {'GiB':>6}"
        )

    def line(self) -> str:
        """One line of a table."""
        share = "–" if self.share_of_peak is None else f"{100 * self.share_of_peak:.0f}%"
        memory = "–" if self.peak_gib is None else f"{self.peak_gib:.1f}"
        return (
            f"{self.model:<22} {self.parameters:>12,} {self.step_ms:>9.1f} {self.tokens_per_second:>10,.0f} "
            f"{self.flops_per_second / 1e12:>8.1f} {share:>8} {memory:>6}"
        )


def step_flops(config: ModelConfig, weights: int, batch: int, tokens: int, kept: float) -> float:
    """Operations of one step: six per weight of a matrix and token, and those of the memories (least work, forward and
    backward). ``weights``: entries of all matrices that tokens are multiplied with; ``kept``: the fraction of chunks in
    routed layers."""
    shape = Shape(config.heads, config.key_dim, config.value_dim, config.softmax_per_head, config.chunk_size)
    total = 6.0 * weights * batch * tokens
    for kind in config.layers:
        case = Case(batch, tokens, kept if kind is Op.routed else 1.0)
        ops = {Op.delta: ("routed_delta_rule",), Op.softmax: ("routed_softmax",), Op.routed: ("branches",)}[kind]
        total += sum(work.flops for op in ops for work in op_work(op, shape, case))
    return total


def measure(config: ThroughputConfig, device: torch.device) -> Iterator[Speed]:
    """Time the dense model, then the routed one under one policy."""
    dense = replace(config.model, layers=[Op.softmax] * len(config.model.layers))
    routed = RoutingPolicy.uniform(config.model.layers, config.model.chunk_size, config.budget)
    yield _time("dense softmax", config, dense, [RoutingPolicy.all_softmax(dense.layers, dense.chunk_size)], device)
    yield _time(f"routed, budget {config.budget:g}", config, config.model, [routed], device)


def _time(
    name: str, config: ThroughputConfig, model: ModelConfig, policies: Sequence[RoutingPolicy], device: torch.device
) -> Speed:
    import torch

    from natsl.model import RoutedLM, count_parameters
    from natsl.train import build_optimizer

    gc.collect()  # a compiled model before this one would count in the largest memory
    torch.manual_seed(0)
    net = RoutedLM(model, precision=config.precision).to(device)
    if config.compile:
        for block in net.blocks:
            block.compile()
    optimizer = build_optimizer(net, TrainConfig())
    gradient = RouteGradient(counterfactual_rate=config.counterfactual_rate)
    tokens = torch.randint(model.vocab_size, (config.batch_size, config.tokens + 1), device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autograd.set_multithreading_enabled(False):  # as in training
            net(inputs, policies, targets=targets, route_gradient=gradient).loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()

    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(WARM_UP):
        step()
    seconds = median_seconds(step, config.steps, device)
    matrices = [module.weight for module in net.modules() if isinstance(module, torch.nn.Linear)]
    matrices += [net.embed.weight] if net.head is None else []
    weights = sum(matrix.numel() for matrix in matrices)
    flops = step_flops(model, weights, config.batch_size, config.tokens, config.budget) / seconds
    half = on_gpu and config.precision is Precision.bfloat16
    peak = [peak for part, peak in PEAK.items() if half and part in torch.cuda.get_device_name(device)]
    return Speed(
        name,
        count_parameters(net),
        1e3 * seconds,
        config.batch_size * config.tokens / seconds,
        flops,
        flops / peak[0] if peak else None,
        peak_gib(device),
    )


def peak_gib(device: torch.device) -> float | None:
    """Largest memory so far, None where it is not known."""
    import torch

    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def median_seconds(step: Callable[[], object], count: int, device: torch.device) -> float:
    """Median over ``count`` calls of ``step``, one after another as in training, by the device's clock."""
    import torch

    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(count):
            step()
            marks.append(time.perf_counter())
        return statistics.median(b - a for a, b in pairwise(marks))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize(device)
    times: list[float] = [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]
    return statistics.median(times)


if __name__ == "__main__":
    from natsl.cli.main import run_verb

    run_verb("throughput")
