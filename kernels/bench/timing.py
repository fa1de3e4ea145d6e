"""Times, memory and ceilings of a CUDA device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from natsl.kernels.bench.roofline import H100, Ceilings

FLUSH_BYTES = 256 << 20  # several times the L2 cache
QUEUE_CYCLES = 10_000_000  # some 6 ms of idling, in which the host gets ahead


def time_ms(function: Callable[[], object], *, queued: bool = False, budget_ms: float = 150.0) -> float:
    """Median milliseconds of ``function`` on the device, by CUDA events, after warm-up and with a cold L2 cache.

    Its backward passes run on the calling thread: a hop to another one costs more than it gives.
    As many repeats as fit into ``budget_ms``, 5 to 50. ``queued``: the device idles first, so that the launches are
    waiting when it starts, as in the middle of a long step; without it a short op may wait for the host.
    """
    with torch.autograd.set_multithreading_enabled(False):
        for _ in range(2):
            function()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        function()
        torch.cuda.synchronize()
        once = 1e3 * (time.perf_counter() - begin)
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        pairs = []
        for _ in range(max(5, min(50, int(budget_ms / once)))):
            flush.zero_()
            if queued:
                torch.cuda._sleep(QUEUE_CYCLES)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            pairs.append((start, end))
            if queued:  # the queue holds about a thousand launches
                torch.cuda.synchronize()
        torch.cuda.synchronize()
    times: list[float] = [start.elapsed_time(end) for start, end in pairs]
    return statistics.median(times)


def peak_gib(function: Callable[[], object], inputs: Iterable[Tensor]) -> float:
    """Largest memory that ``inputs`` and ``function`` hold together, in GiB."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    own = sum(x.numel() * x.element_size() for x in inputs)
    return (torch.cuda.max_memory_allocated() - before + own) / 2**30


def kernel_times(function: Callable[[], object], repeats: int = 3) -> dict[str, tuple[float, int]]:
    """Name of a CUDA kernel → (milliseconds, launches) per call of ``function``."""
    from torch.profiler import ProfilerActivity, profile

    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(repeats):
            function()
        torch.cuda.synchronize()
    times = {}
    for event in trace.key_averages():
        if event.self_device_time_total > 0:
            times[event.key] = (event.self_device_time_total / 1e3 / repeats, round(event.count / repeats))
    return times


def ceilings() -> Ceilings:
    """Operations (half precision) and bytes per second that the current device reaches: stored, else measured."""
    name = torch.cuda.get_device_name()
    if "H100 80GB HBM3" in name:
        return H100
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = time_ms(lambda: a @ a)
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    copy = time_ms(lambda: target.copy_(source))
    return Ceilings(2 * 8192**3 / product * 1e3, 2 * source.numel() / copy * 1e3, f"measured on {name}")
