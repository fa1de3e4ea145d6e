"""Triton kernels against the torch backend in float64, at one shape: outputs, all gradients, bit-equal repeats.

What the benchmark runs before it reports a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from natsl.kernels.dispatch import COUNTERFACTUALS
from natsl.kernels.launch.compilation import compile_ahead
from natsl.kernels.registry import OPS, OpSpec, Options, Tensors, layer_inputs, output_gradients
from natsl.kernels.shape import Case, Shape

# Largest error by dtype, relative to the largest entry of the expected tensor or to 1 if that is larger.
TOLERANCE = {"bfloat16": 1.6e-2, "float16": 2e-3, "float32": 1e-5}


@dataclass(frozen=True)
class Scope:
    """How much is checked: tokens per sequence, the kept fraction, the modes of the router gradient."""

    tokens: int
    fraction: float = 0.3
    modes: tuple[str, ...] = COUNTERFACTUALS


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
class Setting:
    """One way to call an op."""

    spec: OpSpec
    tensors: Tensors
    options: Options
    name: str


def settings(shape: Shape, scope: Scope, device: torch.device) -> Iterator[Setting]:
    """Every checked op in every mode if it routes, on two sequences and, if it packs, on packed ones."""
    lengths = [scope.tokens // 3, 1, 0, shape.chunk_size, max(1, scope.tokens // 2)]
    borders = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    chunks = sum(-(-n // shape.chunk_size) for n in lengths)
    plain = layer_inputs(shape, Case(2, scope.tokens, scope.fraction), device)
    packed = layer_inputs(shape, Case(1, sum(lengths), scope.fraction), device, chunks=chunks)
    for spec in OPS.values():
        if not spec.checked:
            continue
        for mode in scope.modes if spec.routes else scope.modes[:1]:
            options = Options(shape.chunk_size, mode, 1.0, "triton")
            name = f"counterfactual {mode}" if spec.routes else "any route"
            yield Setting(spec, plain, options, name)
            if spec.packs:
                yield Setting(spec, packed, replace(options, cu_seqlens=borders), f"{name}, packed")


def check(shape: Shape, scope: Scope, device: torch.device) -> Iterator[Finding]:
    """Compare every op in the modes of the router gradient: two sequences, and packed ones.

    Raises whatever a kernel raises.
    """
    items = list(settings(shape, scope, device))

    def run() -> None:
        for item in items:
            item.spec.differentiate(item.tensors, item.options)

    compile_ahead(run)
    for item in items:
        yield from _compare(item, TOLERANCE[shape.dtype])


def _compare(item: Setting, bound: float) -> Iterator[Finding]:
    spec, tensors, options = item.spec, item.tensors, item.options
    outputs, gradients = spec.differentiate(tensors, options)
    do = output_gradients(outputs)
    exact = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    expected = spec.differentiate(exact, replace(options, backend="torch"), tuple(x.double() for x in do))
    for i, pair in enumerate(zip(outputs, expected[0], strict=True)):
        yield Finding(spec.name, item.name, f"output {i}", difference(*pair), bound)
    for name, gradient in gradients.items():
        yield Finding(spec.name, item.name, f"gradient of {name}", difference(gradient, expected[1][name]), bound)
    repeat = spec.differentiate(tensors, options, do)
    pairs = [*zip(outputs, repeat[0], strict=True), *((x, repeat[1][name]) for name, x in gradients.items())]
    changes = sum(not torch.equal(a, b) for a, b in pairs)
    yield Finding(spec.name, item.name, "tensors that a second run changes", float(changes), 0.0)
    if options.counterfactual != "none" and spec.computed_route is not None:
        sampled = spec.differentiate(tensors, replace(options, rate=0.5), do)[1]["route"]
        computed = (tensors["route"] > 0.5) == (spec.computed_route == 1)
        error = _sampling_error(computed, sampled, gradients["route"])
        yield Finding(spec.name, f"{item.name}, rate 0.5", "gradient of route", error, bound)


def _sampling_error(computed: Tensor, sampled: Tensor, full: Tensor) -> float:
    """Error of a route's gradient at rate 0.5: ``full`` where the op computes the chunk, elsewhere doubled or 0."""
    nearer = torch.where((sampled - 2 * full).abs() < sampled.abs(), 2 * full, 0.0)
    return difference(sampled, torch.where(computed, full, nearer))
