"""Compilation of all kernels of a routed layer at the same time, before the first step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from natsl.kernels.launch.compilation import compile_ahead
from natsl.kernels.registry import OPS, OpSpec, Options, Tensors, layer_inputs
from natsl.kernels.shape import Case, Shape


def warm_up(
    shape: Shape, device: torch.device, *, batch: int = 1, tokens: int = 4096, counterfactual: str = "none"
) -> int:
    """Compile the kernels of a routed layer and of each of its ops, forward and backward, before they are needed.

    ``batch`` sequences of ``tokens``: some kernels have variants for them. Returns how many were compiled. Does nothing
    without CUDA, and nothing for an op whose kernels do not take the shape.
    """
    if device.type != "cuda":
        return 0
    inputs = layer_inputs(shape, Case(batch, tokens, 0.5), device)
    options = Options(shape.chunk_size, counterfactual, 0.5, "triton")
    specs = [spec for spec in OPS.values() if spec.limit(shape, batch) is None]
    return compile_ahead(lambda: run_all(specs, inputs, options))


def run_all(specs: Sequence[OpSpec], inputs: Tensors, options: Options) -> None:
    """Run ops forward and backward; those that layers call with fixed routes, with such as well."""
    for spec in specs:
        spec.differentiate(inputs, options)
    fixed = {**inputs, "route": inputs["route"].detach()}
    for spec in specs:
        if spec.fixed_routes:
            spec.differentiate(fixed, options)
