"""Search of launch parameters: every candidate of every kernel compiled, checked against the default and timed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from natsl.kernels.bench.timing import time_ms
from natsl.kernels.bench.verify import TOLERANCE, difference
from natsl.kernels.launch import parameters
from natsl.kernels.launch.compilation import Compilation
from natsl.kernels.registry import OPS, KernelSpec, OpSpec, Options, Tensors, layer_inputs, output_gradients
from natsl.kernels.shape import Case, Shape

# Few long sequences and many short ones: both count.
CASES = (Case(8, 4096, 0.3), Case(1, 32768, 0.3))
# A candidate that gains less than this is left to the default.
LEAST_GAIN = 0.01
_LEAST = {"num_warps": 2, "num_stages": 1, "PROGRAMS": 1, "BLOCK_ROWS": 1}  # of every other parameter: 16


@dataclass(frozen=True)
class Step:
    """One kernel, tuned in the pass of the op that launches it."""

    spec: OpSpec
    kernel: KernelSpec

    def options(self, shape: Shape) -> Options:
        return Options(shape.chunk_size, "insertion" if self.kernel.counterfactual else "none", 1.0, "triton")


def steps() -> list[Step]:
    """What is tuned: each kernel with candidates, once for each op that launches it."""
    return [Step(spec, kernel) for spec in OPS.values() for kernel in spec.kernels if kernel.candidates]


def candidates(kernel: KernelSpec, default: Mapping[str, int], dtype: str) -> list[dict[str, int]]:
    """Parameters to try beside ``default``, complete and each once."""
    if dtype == "float32":
        changes = [{name: new} for name, value in default.items() for new in _neighbours(name, value)]
    else:
        changes = list(kernel.candidates)
    complete = [{name: change.get(name, value) for name, value in default.items()} for change in changes]
    return [item for i, item in enumerate(complete) if item != default and item not in complete[:i]]


def _neighbours(name: str, value: int) -> list[int]:
    if name == "FUSED":
        return [1 - value]
    if name == "maxnreg":
        return []
    near = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
    return [new for new in near if new >= _LEAST.get(name, 16)]


@dataclass
class Choice:
    """The best parameters of one kernel: the time of its op's pass with them, as a share of the default's."""

    kernel: str
    key: str
    default: dict[str, int]
    best: dict[str, int]
    share: float
    skipped: list[str] = field(default_factory=list)


def tune(
    shape: Shape, device: torch.device, report: Callable[[Choice], None], cases: Sequence[Case] = CASES
) -> dict[str, dict[str, dict[str, int]]]:
    """Best parameters by kernel and key, on average over ``cases``; the kernel's own default where little is gained.

    A candidate that does not compile, needs more than the device has or changes the result is skipped; ``report`` is
    called after every kernel. Raises ``RuntimeError`` if a candidate breaks the device.
    """
    inputs = [layer_inputs(shape, case, device) for case in cases]
    compilation = Compilation()
    results: dict[str, dict[str, dict[str, int]]] = {}
    with parameters.untuned():
        for step in steps():
            name, options = step.kernel.name, step.options(shape)
            with parameters.observed() as picks:
                for tensors in inputs:
                    _collect(compilation, step.spec, tensors, options)
            _, default = picks[name]
            for candidate in candidates(step.kernel, default, shape.dtype):
                with parameters.forced({name: candidate}):
                    _collect(compilation, step.spec, inputs[0], options)
        compilation.run()
        for step in steps():
            choice = _choose(step, shape, inputs)
            report(choice)
            results.setdefault(choice.kernel, {})[choice.key] = choice.best
    return results


def _collect(compilation: Compilation, spec: OpSpec, tensors: Tensors, options: Options) -> None:
    try:
        with compilation.collect():
            spec.differentiate(tensors, options)
    except Exception as error:  # a candidate that cannot even be launched is skipped again, and named, when it is timed
        _raise_if_broken(error)


def _raise_if_broken(error: Exception) -> None:
    """After an error of the device every later call fails: the search cannot go on."""
    if any(sign in str(error) for sign in ("CUDA error", "illegal", "misaligned", "unspecified launch failure")):
        raise RuntimeError(f"a candidate broke the device, nothing is stored: {error}") from error


def _choose(step: Step, shape: Shape, inputs: Sequence[Tensors]) -> Choice:
    name, options = step.kernel.name, step.options(shape)
    with parameters.observed() as picks:
        outputs, gradients = step.spec.differentiate(inputs[0], options)
    key, default = picks[name]
    expected = [*outputs, *gradients.values()]
    base = [_time(step, tensors, options) for tensors in inputs]
    choice = Choice(name, key, default, default, 1.0)
    for candidate in candidates(step.kernel, default, shape.dtype):
        try:
            with parameters.forced({name: candidate}):
                outputs, gradients = step.spec.differentiate(inputs[0], options)
                error = max(map(difference, [*outputs, *gradients.values()], expected))
                if error > TOLERANCE[shape.dtype]:
                    choice.skipped.append(f"{candidate}: the result is off by {error:.1e}")
                    continue
                times = [_time(step, tensors, options) for tensors in inputs]
        except Exception as error:  # out of registers or shared memory, or a block that the kernel does not allow
            _raise_if_broken(error)
            choice.skipped.append(f"{candidate}: {(str(error).splitlines() or [type(error).__name__])[0]}")
            continue
        share = math.exp(statistics.fmean(math.log(t / b) for t, b in zip(times, base, strict=True)))
        if share < min(choice.share, 1.0 - LEAST_GAIN):
            choice.best, choice.share = candidate, share
    return choice


def _time(step: Step, tensors: Tensors, options: Options) -> float:
    """Milliseconds of the pass in which the kernel runs."""
    spec = step.spec
    if not step.kernel.in_backward:
        return time_ms(lambda: spec.forward(tensors, options), queued=True, budget_ms=30.0)
    outputs = spec.forward(tensors, options)
    do = output_gradients(outputs)
    return time_ms(lambda: spec.backward(tensors, outputs, do, retain=True), queued=True, budget_ms=30.0)
