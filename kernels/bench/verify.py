"""Triton kernels against the torch backend in float64, at one shape: outputs, all gradients, bit-equal repeats.

What the benchmark runs before it reports a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from natsl.kernels.bench.roofline import Shape
from natsl.kernels.launch.parameters import compile_ahead
from natsl.kernels.registry import OPS, Options, Tensors, differentiate, layer_inputs, output_gradients

# Largest error by dtype, relative to the largest entry of the expected tensor or to 1 if that is larger.
TOLERANCE = {"bfloat16": 1.6e-2, "float16": 2e-3, "float32": 1e-5}
MODES = ("none", "derivative", "insertion")


@dataclass(frozen=True)
class Finding:
    """One comparison: which op, how it was called, which tensor, the error and its bound."""

    op: str
    setting: str
    tensor: str
    error: float
    bound: float

    @property
    def good(self) -> bool:
        return self.error <= self.bound


def difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected entry, at least 1; infinite where something is not finite."""
    if actual.shape != expected.shape:
        return math.inf
    if actual.numel() == 0:
        return 0.0
    expected = expected.double()
    gap = float((actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1.0))
    return gap if math.isfinite(gap) else math.inf


@dataclass(frozen=True)
class _Setting:
    op: str
    tensors: Tensors
    options: Options
    name: str


def _settings(
    shape: Shape, tokens: int, device: torch.device, fraction: float, modes: Sequence[str]
) -> Iterator[_Setting]:
    """The whole layer is left out: after a norm, a small row's rounding is no longer small beside the largest entry."""
    lengths = [tokens // 3, 1, 0, shape.chunk_size, max(1, tokens // 2)]
    borders = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    chunks = sum(-(-n // shape.chunk_size) for n in lengths)
    plain = layer_inputs(shape, 2, tokens, fraction, device)
    packed = layer_inputs(shape, 1, sum(lengths), fraction, device, chunks=chunks)
    for op in OPS:
        routed = "route" in OPS[op][0]
        for mode in modes if routed else modes[:1]:
            options = Options(shape.chunk_size, mode, 1.0, "triton")
            name = f"counterfactual {mode}" if routed else "any route"
            if op != "layer":
                yield _Setting(op, plain, options, name)
            if op in ("routed_softmax", "routed_delta_rule"):
                yield _Setting(op, packed, replace(options, cu_seqlens=borders), f"{name}, packed")


def check(
    shape: Shape, tokens: int, device: torch.device, fraction: float = 0.3, modes: Sequence[str] = MODES
) -> Iterator[Finding]:
    """Compare every op in ``modes`` of the router gradient: two sequences of ``tokens`` tokens, and packed ones.

    Raises whatever a kernel raises.
    """
    settings = list(_settings(shape, tokens, device, fraction, modes))

    def run() -> None:
        for item in settings:
            differentiate(item.op, item.tensors, item.options)

    compile_ahead(run)
    for item in settings:
        yield from _compare(item, TOLERANCE[shape.dtype])


def _compare(item: _Setting, bound: float) -> Iterator[Finding]:
    exact = {name: x.detach().double().requires_grad_() for name, x in item.tensors.items()}
    outputs, gradients = differentiate(item.op, item.tensors, item.options)
    given = output_gradients(outputs)
    other = replace(item.options, backend="torch")
    expected, wanted = differentiate(item.op, exact, other, tuple(x.double() for x in given))
    for i, pair in enumerate(zip(outputs, expected, strict=True)):
        yield Finding(item.op, item.name, f"output {i}", difference(*pair), bound)
    for name, actual in gradients.items():
        yield Finding(item.op, item.name, f"gradient of {name}", difference(actual, wanted[name]), bound)
    again, repeated = differentiate(item.op, item.tensors, item.options, given)
    pairs = [*zip(outputs, again, strict=True), *((x, repeated[name]) for name, x in gradients.items())]
    changed = sum(not torch.equal(a, b) for a, b in pairs)
    yield Finding(item.op, item.name, "tensors that a second run changes", float(changed), 0.0)
    if item.options.counterfactual != "none" and item.op in ("routed_softmax", "routed_delta_rule"):
        half = differentiate(item.op, item.tensors, replace(item.options, rate=0.5), given)[1]["route"]
        error = _sampling_error(item, half, gradients["route"])
        yield Finding(item.op, f"{item.name}, rate 0.5", "gradient of route", error, bound)


def _sampling_error(item: _Setting, half: Tensor, whole: Tensor) -> float:
    """With half of the other side sampled, a route's gradient there is doubled or 0; on the chosen side it is as is."""
    route = item.tensors["route"]
    chosen = route > 0.5 if item.op == "routed_softmax" else route < 0.5
    nearer = torch.where((half - 2 * whole).abs() < half.abs(), 2 * whole, 0.0)
    return difference(half, torch.where(chosen, whole, nearer))
