"""Search of launch parameters: every candidate of every kernel compiled, checked against the default and timed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from natsl.kernels.bench.roofline import Case, Shape
from natsl.kernels.bench.timing import time_ms
from natsl.kernels.bench.verify import TOLERANCE, difference
from natsl.kernels.launch import parameters as tuning
from natsl.kernels.registry import (
    Options,
    Tensors,
    backward,
    differentiate,
    forward,
    layer_inputs,
    output_gradients,
)

# Few long sequences and many short ones: both count.
CASES = (Case(8, 4096, 0.3), Case(1, 32768, 0.3))
# A candidate that gains less than this is left to the default.
LEAST_GAIN = 0.01


def _grid(names: str, rows: Sequence[tuple[int, ...]]) -> list[dict[str, int]]:
    return [dict(zip(names.split(), row, strict=True)) for row in rows]


_TILES = "BLOCK_M BLOCK_N num_warps num_stages"
_COLUMNS = "BV num_warps num_stages"
# What is worth trying in half precision; in float32, where tiles are small, it is the neighbours of the default. Shapes
# that Triton 3.6 miscompiles on Hopper (few columns, or one tile of 64 rows over too many warps) are left out: they
# break the device. The scan's blocks follow from the number of heads and sequences: there is nothing to store.
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "softmax_forward": _grid(f"{_TILES} maxnreg", [
        (128, 64, 8, 3, 255), (128, 64, 8, 2, 128), (64, 64, 4, 2, 168), (64, 64, 4, 3, 168), (64, 64, 4, 2, 255),
        (64, 32, 4, 3, 168), (64, 32, 4, 3, 128),
    ]),
    "softmax_dq": _grid(_TILES, [(128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3)]),
    "softmax_dkv": _grid(_TILES, [
        (64, 128, 8, 2), (32, 128, 8, 3), (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 3),
    ]),
    "softmax_counterfactual": _grid(_TILES, [(128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3)]),
    "delta_prepare": _grid("BK num_warps num_stages", [(32, 4, 1), (64, 4, 1), (128, 4, 1)]),
    "delta_output": _grid(_COLUMNS, [(64, 4, 2), (128, 4, 2), (128, 8, 2)]),
    "delta_backward_scan": _grid(_COLUMNS, [(32, 4, 2), (32, 4, 3), (64, 4, 2), (64, 4, 3)]),
    "delta_backward": _grid(f"{_COLUMNS} FUSED", [
        (32, 8, 1, 1), (32, 8, 2, 1), (32, 8, 3, 1), (64, 8, 1, 1), (64, 8, 2, 0),
    ]),
    "delta_backward_finish": _grid("BK num_warps num_stages", [(32, 4, 1), (64, 4, 1), (64, 8, 1), (128, 8, 1)]),
    "mix_forward": _grid("BLOCK_ROWS num_warps", [(8, 4), (16, 4), (16, 8), (32, 8)]),
    "mix_backward": _grid("BLOCK_ROWS num_warps PROGRAMS", [(8, 4, 2), (8, 4, 4), (8, 8, 4), (16, 8, 2), (16, 8, 4)]),
}  # fmt: skip
_LEAST = {"num_warps": 2, "num_stages": 1, "PROGRAMS": 1, "BLOCK_ROWS": 1}  # of every other parameter: 16


def candidates(kernel: str, default: Mapping[str, int], dtype: str) -> list[dict[str, int]]:
    """Parameters to try beside ``default``, complete and each once."""
    if dtype == "float32":
        changes = [{name: new} for name, value in default.items() for new in _neighbours(name, value)]
    else:
        changes = CANDIDATES[kernel]
    complete = [{name: change.get(name, value) for name, value in default.items()} for change in changes]
    return [item for i, item in enumerate(complete) if item != default and item not in complete[:i]]


def _neighbours(name: str, value: int) -> list[int]:
    if name == "FUSED":
        return [1 - value]
    if name == "maxnreg":
        return []
    near = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
    return [new for new in near if new >= _LEAST.get(name, 16)]


# (op, whether the kernels run in its backward pass) → its kernels
STEPS = {
    ("routed_softmax", False): ("softmax_forward",),
    ("routed_softmax", True): ("softmax_dq", "softmax_dkv", "softmax_counterfactual"),
    ("routed_delta_rule", False): ("delta_prepare", "delta_output"),
    ("routed_delta_rule", True): ("delta_backward_scan", "delta_backward", "delta_backward_finish"),
    ("routed_mix", False): ("mix_forward",),
    ("routed_mix", True): ("mix_backward",),
    ("gated_norm", False): ("mix_forward",),
    ("gated_norm", True): ("mix_backward",),
}


@dataclass
class Choice:
    """What tuning found for one kernel: times of its op's pass, as a share of the default's."""

    kernel: str
    key: str
    default: dict[str, int]
    best: dict[str, int]
    share: float
    skipped: list[str] = field(default_factory=list)


def _options(kernel: str, shape: Shape) -> Options:
    mode = "insertion" if kernel == "softmax_counterfactual" else "none"
    return Options(shape.chunk_size, mode, 1.0, "triton")


def tune(
    shape: Shape, device: torch.device, report: Callable[[Choice], None], cases: Sequence[Case] = CASES
) -> dict[str, dict[str, dict[str, int]]]:
    """Best parameters by kernel and key, on average over ``cases``; the kernel's own default where little is gained.

    A candidate that does not compile, needs more than the device has or changes the result is skipped; ``report`` is
    called after every kernel. Raises ``RuntimeError`` if a candidate breaks the device.
    """
    inputs = [layer_inputs(shape, case.batch, case.tokens, case.fraction, device) for case in cases]
    compilation = tuning.Compilation()
    found: dict[str, dict[str, dict[str, int]]] = {}
    with tuning.untuned():
        for (op, _), kernels in STEPS.items():
            for kernel in kernels:
                with tuning.observed() as seen:
                    for tensors in inputs:
                        _collect(compilation, op, tensors, _options(kernel, shape))
                for candidate in candidates(kernel, seen[kernel][1], shape.dtype):
                    with tuning.forced({kernel: candidate}):
                        _collect(compilation, op, inputs[0], _options(kernel, shape))
        compilation.run()
        for (op, in_backward), kernels in STEPS.items():
            for kernel in kernels:
                choice = _choose(shape, op, in_backward, kernel, inputs)
                report(choice)
                found.setdefault(kernel, {})[choice.key] = choice.best
    return found


def _collect(compilation: tuning.Compilation, op: str, tensors: Tensors, options: Options) -> None:
    try:
        with compilation.collect():
            differentiate(op, tensors, options)
    except Exception as error:  # a candidate that cannot even be launched is skipped again, and named, when it is timed
        _raise_if_broken(error)


def _raise_if_broken(error: Exception) -> None:
    """After an error of the device every later call fails: the search cannot go on."""
    if any(sign in str(error) for sign in ("CUDA error", "illegal", "misaligned", "unspecified launch failure")):
        raise RuntimeError(f"a candidate broke the device, nothing is stored: {error}") from error


def _choose(shape: Shape, op: str, in_backward: bool, kernel: str, inputs: Sequence[Tensors]) -> Choice:
    options = _options(kernel, shape)
    with tuning.observed() as seen:
        outputs, gradients = differentiate(op, inputs[0], options)
    key, default = seen[kernel]
    expected = [*outputs, *gradients.values()]
    base = [_time(op, in_backward, tensors, options) for tensors in inputs]
    choice = Choice(kernel, key, default, default, 1.0)
    for candidate in candidates(kernel, default, shape.dtype):
        try:
            with tuning.forced({kernel: candidate}):
                outputs, gradients = differentiate(op, inputs[0], options)
                error = max(map(difference, [*outputs, *gradients.values()], expected))
                if error > TOLERANCE[shape.dtype]:
                    choice.skipped.append(f"{candidate}: the result is off by {error:.1e}")
                    continue
                times = [_time(op, in_backward, tensors, options) for tensors in inputs]
        except Exception as error:  # out of registers or shared memory, or a block that the kernel does not allow
            _raise_if_broken(error)
            choice.skipped.append(f"{candidate}: {(str(error).splitlines() or [type(error).__name__])[0]}")
            continue
        share = math.exp(statistics.fmean(math.log(t / b) for t, b in zip(times, base, strict=True)))
        if share < min(choice.share, 1.0 - LEAST_GAIN):
            choice.best, choice.share = candidate, share
    return choice


def _time(op: str, in_backward: bool, tensors: Tensors, options: Options) -> float:
    if not in_backward:
        return time_ms(lambda: forward(op, tensors, options), queued=True, budget_ms=30.0)
    outputs = forward(op, tensors, options)
    given = output_gradients(outputs)
    return time_ms(lambda: backward(op, tensors, outputs, given, retain=True), queued=True, budget_ms=30.0)
