"""Speed of a whole training step: the routed model against the same model with dense softmax attention in every layer.

Both read random tokens in the model's vocabulary and take the same step: forward, backward, clipping, AdamW. The dense
model's attention is torch's SDPA (cuDNN on CUDA). Times are medians over single steps, by the device's clock.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from natsl.cli import resolve_device, run_main
from natsl.config import ModelConfig, Precision, SupernetConfig, ThroughputConfig, TrainConfig, to_plain
from natsl.kernels.bench.roofline import Case, Shape, op_work
from natsl.space.policy import Op, RoutingPolicy

if TYPE_CHECKING:  # torch is imported where it is used, so that --help stays fast
    import torch

PEAK = {"H100 80GB HBM3": 989e12}  # bfloat16 operations per second, dense, as the vendor states them
WARM_UP = 3  # steps that are not timed


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
    net = RoutedLM(model).to(device)
    net.precision = config.precision
    if config.compile:
        for block in net.blocks:
            block.compile()
    optimizer = build_optimizer(net, TrainConfig())
    supernet = SupernetConfig(counterfactual_rate=config.counterfactual_rate)
    tokens = torch.randint(model.vocab_size, (config.batch_size, config.tokens + 1), device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autograd.set_multithreading_enabled(False):  # as in training
            net.token_losses(inputs, policies, targets, supernet).loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()

    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(WARM_UP):
        step()
    seconds = _median_seconds(step, config.steps, device)
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
        torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None,
    )


def _median_seconds(step: Callable[[], None], count: int, device: torch.device) -> float:
    """Median over ``count`` steps, one after another as in training."""
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


def run_throughput(config: ThroughputConfig) -> None:
    """The command ``natsl.throughput``: a table, and ``throughput.json`` in the folder ``out``."""
    import torch

    device = resolve_device(config.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}; {config.batch_size} × {config.tokens} tokens, {config.precision.value}")
    print(f"{'model':<22} {'parameters':>12} {'step ms':>9} {'tokens/s':>10} {'TFLOP/s':>8} {'of peak':>8} {'GiB':>6}")
    rows = []
    for row in measure(config, device):
        rows.append(row)
        share = "–" if row.share_of_peak is None else f"{100 * row.share_of_peak:.0f}%"
        memory = "–" if row.peak_gib is None else f"{row.peak_gib:.1f}"
        print(
            f"{row.model:<22} {row.parameters:>12,} {row.step_ms:>9.1f} {row.tokens_per_second:>10,.0f} "
            f"{row.flops_per_second / 1e12:>8.1f} {share:>8} {memory:>6}",
            flush=True,
        )
    path = Path(config.out) / "throughput.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "device": name,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "config": to_plain(config),
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"Written: {path}")


def main() -> None:
    """Entry point of ``python -m natsl.throughput``."""
    run_main("throughput", ThroughputConfig, run_throughput)


if __name__ == "__main__":
    main()
