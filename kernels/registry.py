"""Random inputs of one routed layer and the ops on them: what benchmarks, checks, tuning and warm-up run.

Shapes: B batch, T tokens, C chunk size, N chunks, R heads, K/V key/value width, G softmax heads per head, Hs = R·G.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from natsl.kernels.bench.roofline import Shape
from natsl.kernels.branches import routed_branches
from natsl.kernels.delta import routed_delta_rule
from natsl.kernels.dispatch import split_values
from natsl.kernels.mix import gated_norm, routed_mix
from natsl.kernels.softmax import routed_softmax

EPS = 1e-6

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Options:
    """How the ops are called."""

    chunk_size: int
    counterfactual: str = "none"
    rate: float = 1.0
    backend: str = "auto"
    cu_seqlens: Tensor | None = None

    @property
    def routing(self) -> dict[str, Any]:
        """What every op that routes takes by name, but for packing."""
        return {
            "chunk_size": self.chunk_size,
            "counterfactual": self.counterfactual,
            "counterfactual_rate": self.rate,
            "backend": self.backend,
        }


def layer_inputs(
    shape: Shape,
    batch: int,
    tokens: int,
    fraction: float,
    device: torch.device,
    *,
    chunks: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Everything that the ops of one layer read, each collecting gradients.

    q, k [B,T,R,K], v [B,T,R,V], q_softmax, k_softmax [B,T,Hs,K/G], o_delta, o_softmax, gate [B,T,Hs,V/G], mix_logits
    [B,T,Hs,2] in the shape's dtype; g, beta [B,T,R], weights [V/G] and route [B,N,R] float32. Each chunk of each head
    is kept with probability ``fraction``. ``chunks``: N where sequences are packed.
    """
    generator = torch.Generator(device).manual_seed(seed)
    dtype: torch.dtype = getattr(torch, shape.dtype)
    R, Hs = shape.heads, shape.softmax_heads
    Ks, Vs = shape.key_dim // shape.softmax_per_head, shape.value_dim // shape.softmax_per_head
    N = -(-tokens // shape.chunk_size) if chunks is None else chunks

    def normal(heads: int, width: int) -> Tensor:
        return torch.randn(batch, tokens, heads, width, generator=generator, device=device, dtype=dtype)

    def uniform(*sizes: int) -> Tensor:
        return torch.rand(sizes, generator=generator, device=device)

    tensors = {
        "q": normal(R, shape.key_dim),
        "k": normal(R, shape.key_dim),
        "v": normal(R, shape.value_dim),
        "q_softmax": normal(Hs, Ks),
        "k_softmax": normal(Hs, Ks),
        "g": -torch.exp(uniform(batch, tokens, R) * math.log(1e-3)),  # decays of e^-0.001 to e^-1 per token
        "beta": uniform(batch, tokens, R),
        "route": (uniform(batch, N, R) < fraction).float(),
        "o_delta": normal(Hs, Vs),
        "o_softmax": normal(Hs, Vs),
        "gate": normal(Hs, Vs),
        "mix_logits": normal(Hs, 2),
        "weight_delta": 0.5 + uniform(Vs),
        "weight_softmax": 0.5 + uniform(Vs),
    }
    return {name: x.requires_grad_() for name, x in tensors.items()}


def _softmax(x: Tensors, options: Options) -> tuple[Tensor, ...]:
    values = split_values(x["v"], x["q_softmax"].shape[2])
    o = routed_softmax(
        x["q_softmax"],
        x["k_softmax"],
        values,
        x["route"],
        cu_seqlens=options.cu_seqlens,
        **options.routing,
    )
    return (o,)


def _delta(x: Tensors, options: Options) -> tuple[Tensor, ...]:
    o, _ = routed_delta_rule(
        x["q"],
        x["k"],
        x["v"],
        x["g"],
        x["beta"],
        x["route"],
        cu_seqlens=options.cu_seqlens,
        **options.routing,
    )
    return (o,)


def _branches(x: Tensors, options: Options) -> tuple[Tensor, ...]:
    return routed_branches(
        x["q"],
        x["k"],
        x["v"],
        x["q_softmax"],
        x["k_softmax"],
        x["g"],
        x["beta"],
        x["route"],
        **options.routing,
    )


def _mix(x: Tensors, options: Options) -> tuple[Tensor, ...]:
    y = routed_mix(
        x["o_delta"],
        x["o_softmax"],
        x["gate"],
        x["mix_logits"],
        x["weight_delta"],
        x["weight_softmax"],
        eps=EPS,
        backend=options.backend,
    )
    return (y,)


def _layer(x: Tensors, options: Options) -> tuple[Tensor, ...]:
    o_delta, o_softmax = _branches(x, options)
    return _mix({**x, "o_delta": o_delta.reshape(o_softmax.shape), "o_softmax": o_softmax}, options)


def _gated_norm(x: Tensors, options: Options) -> tuple[Tensor, ...]:
    return (gated_norm(x["o_delta"], x["gate"], x["weight_delta"], eps=EPS, backend=options.backend),)


_BRANCHES = ("q", "k", "v", "q_softmax", "k_softmax", "g", "beta", "route")
_MIX = ("gate", "mix_logits", "weight_delta", "weight_softmax")
# op → (names of its inputs, the op)
OPS: dict[str, tuple[tuple[str, ...], Callable[[Tensors, Options], tuple[Tensor, ...]]]] = {
    "routed_softmax": (("q_softmax", "k_softmax", "v", "route"), _softmax),
    "routed_delta_rule": (("q", "k", "v", "g", "beta", "route"), _delta),
    "branches": (_BRANCHES, _branches),
    "routed_mix": (("o_delta", "o_softmax", *_MIX), _mix),
    "gated_norm": (("o_delta", "gate", "weight_delta"), _gated_norm),
    "layer": ((*_BRANCHES, *_MIX), _layer),
}


def forward(op: str, tensors: Tensors, options: Options) -> tuple[Tensor, ...]:
    """Outputs of ``op``."""
    return OPS[op][1](tensors, options)


def output_gradients(outputs: tuple[Tensor, ...], seed: int = 1) -> tuple[Tensor, ...]:
    """Random gradients of outputs, the same for the same shapes and dtypes."""
    generator = torch.Generator(outputs[0].device).manual_seed(seed)
    return tuple(torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype) for x in outputs)


def backward(
    op: str, tensors: Tensors, outputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...], retain: bool = False
) -> dict[str, Tensor]:
    """Gradients of the inputs of ``op``, by name."""
    names = OPS[op][0]
    found = torch.autograd.grad(outputs, [tensors[name] for name in names], gradients, retain_graph=retain)
    return dict(zip(names, found, strict=True))


def differentiate(
    op: str, tensors: Tensors, options: Options, gradients: tuple[Tensor, ...] | None = None
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Outputs of ``op`` and the gradients of its inputs; ``gradients``: those of the outputs (default: random)."""
    outputs = forward(op, tensors, options)
    given = output_gradients(outputs) if gradients is None else gradients
    return tuple(x.detach() for x in outputs), backward(op, tensors, outputs, given)
