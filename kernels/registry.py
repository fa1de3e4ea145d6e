"""Every op in one entry: its inputs, call, limits, kernels and least work. What runs all ops reads this, nothing else.

Benchmark, checks, tuning, profile and warm-up are derived from ``OPS``: a new op is one ``OpSpec``. Shapes: B batch, T
tokens, C chunk size, N chunks, R heads, K/V key/value width, G softmax heads per head, Hs = R·G.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from natsl.kernels import branches, delta, mix, softmax
from natsl.kernels.dispatch import Limits, split_values
from natsl.kernels.shape import (
    Case,
    Shape,
    Work,
    delta_backward,
    delta_forward,
    delta_work,
    earlier_pairs,
    mix_backward,
    mix_forward,
    softmax_backward,
    softmax_forward,
    softmax_work,
)

EPS = 1e-6

Tensors = Mapping[str, Tensor]
Formula = Callable[[Shape, Case], Work]


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
        """What every op that routes takes by name."""
        return {
            "chunk_size": self.chunk_size,
            "cu_seqlens": self.cu_seqlens,
            "counterfactual": self.counterfactual,
            "counterfactual_rate": self.rate,
            "backend": self.backend,
        }


@dataclass(frozen=True)
class KernelSpec:
    """One Triton kernel: the jit function ``<name>_kernel``, called ``name`` in the tables of launch parameters.

    ``in_backward``: whether it runs in the backward pass; ``work``: its products, its inputs and outputs once each,
    None if neither bounds it; ``candidates``: launch parameters worth trying in half precision (in float32, where tiles
    are small, tuning tries the neighbours of the default), empty if there is nothing to tune; ``counterfactual``:
    whether it runs only where the router gradient samples the chunks that were left out.
    """

    name: str
    in_backward: bool = False
    work: Formula | None = None
    candidates: tuple[dict[str, int], ...] = ()
    counterfactual: bool = False


@dataclass(frozen=True)
class OpWork:
    """Least work of an op, forward and backward: one ideal kernel per pass."""

    forward: Formula
    backward: Formula


@dataclass(frozen=True)
class OpSpec:
    """One op.

    ``inputs``: names of the tensors of ``layer_inputs`` that it reads; ``call``: the op on these; ``limits``: what its
    kernels take; ``kernels``: those that it launches itself, forward before backward, none if it only calls other ops;
    ``work``: its least work, None for an op without a row in the benchmark. ``packs``: whether it takes packed
    sequences; ``computed_route``: the route of the chunks that it computes (1 softmax, 0 delta rule), None if it
    computes all or does not route; ``fixed_routes``: whether layers also call it with routes that collect no gradient;
    ``checked``: whether its outputs are compared with those of the torch backend in float64.
    """

    name: str
    inputs: tuple[str, ...]
    call: Callable[[Tensors, Options], tuple[Tensor, ...]]
    limits: tuple[Limits, ...]
    kernels: tuple[KernelSpec, ...] = ()
    work: OpWork | None = None
    packs: bool = False
    computed_route: int | None = None
    fixed_routes: bool = False
    checked: bool = True

    @property
    def routes(self) -> bool:
        return "route" in self.inputs

    def limit(self, shape: Shape, batch: int) -> str | None:
        """Why its kernels do not take ``batch`` sequences of that shape, or None if they do."""
        sizes = {
            "K": shape.key_dim,
            "V": shape.value_dim,
            "Ks": shape.softmax_key_dim,
            "Vs": shape.softmax_value_dim,
            "batch": batch,
            "sequences · heads": batch * shape.heads,
        }
        dtype: torch.dtype = getattr(torch, shape.dtype)
        reasons = (limits.reason(dtype, shape.chunk_size, sizes) for limits in self.limits)
        return next((reason for reason in reasons if reason is not None), None)

    def forward(self, tensors: Tensors, options: Options) -> tuple[Tensor, ...]:
        """Outputs of the op."""
        return self.call(tensors, options)

    def backward(
        self, tensors: Tensors, outputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...], *, retain: bool = False
    ) -> dict[str, Tensor]:
        """Gradients of the inputs that collect one, by name, from those of the outputs."""
        names = [name for name in self.inputs if tensors[name].requires_grad]
        results = torch.autograd.grad(outputs, [tensors[name] for name in names], gradients, retain_graph=retain)
        return dict(zip(names, results, strict=True))

    def differentiate(
        self, tensors: Tensors, options: Options, gradients: tuple[Tensor, ...] | None = None
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Outputs and the gradients of the inputs; ``gradients``: those of the outputs (default: random)."""
        outputs = self.forward(tensors, options)
        gradients = output_gradients(outputs) if gradients is None else gradients
        return tuple(x.detach() for x in outputs), self.backward(tensors, outputs, gradients)


def output_gradients(outputs: tuple[Tensor, ...], seed: int = 1) -> tuple[Tensor, ...]:
    """Random gradients of outputs, the same for the same shapes and dtypes."""
    generator = torch.Generator(outputs[0].device).manual_seed(seed)
    return tuple(torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype) for x in outputs)


def layer_inputs(
    shape: Shape, case: Case, device: torch.device, *, chunks: int | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Everything that the ops of one layer read, each collecting gradients.

    q, k [B,T,R,K], v [B,T,R,V], q_softmax, k_softmax [B,T,Hs,K/G], o_delta, o_softmax, gate [B,T,Hs,V/G], mix_logits
    [B,T,Hs,2] in the shape's dtype; g, beta [B,T,R], weights [V/G] and route [B,N,R] float32. Each chunk of each head
    is kept with the probability of the case. ``chunks``: N where sequences are packed.
    """
    generator = torch.Generator(device).manual_seed(seed)
    dtype: torch.dtype = getattr(torch, shape.dtype)
    B, T, R, Hs = case.batch, case.tokens, shape.heads, shape.softmax_heads
    Ks, Vs = shape.softmax_key_dim, shape.softmax_value_dim
    N = -(-T // shape.chunk_size) if chunks is None else chunks

    def normal(heads: int, width: int) -> Tensor:
        return torch.randn(B, T, heads, width, generator=generator, device=device, dtype=dtype)

    def uniform(*sizes: int) -> Tensor:
        return torch.rand(sizes, generator=generator, device=device)

    tensors = {
        "q": normal(R, shape.key_dim),
        "k": normal(R, shape.key_dim),
        "v": normal(R, shape.value_dim),
        "q_softmax": normal(Hs, Ks),
        "k_softmax": normal(Hs, Ks),
        "g": -torch.exp(uniform(B, T, R) * math.log(1e-3)),  # decays of e^-0.001 to e^-1 per token
        "beta": uniform(B, T, R),
        "route": (uniform(B, N, R) < case.fraction).float(),
        "o_delta": normal(Hs, Vs),
        "o_softmax": normal(Hs, Vs),
        "gate": normal(Hs, Vs),
        "mix_logits": normal(Hs, 2),
        "weight_delta": 0.5 + uniform(Vs),
        "weight_softmax": 0.5 + uniform(Vs),
    }
    return {name: x.requires_grad_() for name, x in tensors.items()}


def _call_softmax(x: Tensors, options: Options) -> tuple[Tensor, ...]:
    values = split_values(x["v"], x["q_softmax"].shape[2])
    tensors = x["q_softmax"], x["k_softmax"], values, x["route"]
    return (softmax.routed_softmax(*tensors, **options.routing),)


def _call_delta(x: Tensors, options: Options) -> tuple[Tensor, ...]:
    tensors = [x[name] for name in _DELTA]
    o, _ = delta.routed_delta_rule(*tensors, **options.routing)
    return (o,)


def _call_branches(x: Tensors, options: Options) -> tuple[Tensor, ...]:
    return branches.routed_branches(*[x[name] for name in _BRANCHES], **options.routing)


def _call_mix(x: Tensors, options: Options) -> tuple[Tensor, ...]:
    return (mix.routed_mix(*[x[name] for name in _MIX], eps=EPS, backend=options.backend),)


def _call_gated_norm(x: Tensors, options: Options) -> tuple[Tensor, ...]:
    return (mix.gated_norm(*[x[name] for name in _GATED_NORM], eps=EPS, backend=options.backend),)


def _call_layer(x: Tensors, options: Options) -> tuple[Tensor, ...]:
    o_delta, o_softmax = _call_branches(x, options)
    return _call_mix({**x, "o_delta": o_delta.reshape(o_softmax.shape), "o_softmax": o_softmax}, options)


_DELTA = ("q", "k", "v", "g", "beta", "route")
_BRANCHES = ("q", "k", "v", "q_softmax", "k_softmax", "g", "beta", "route")
_MIX = ("o_delta", "o_softmax", "gate", "mix_logits", "weight_delta", "weight_softmax")
_GATED_NORM = ("o_delta", "gate", "weight_delta")


def _sum(*formulas: Formula) -> Formula:
    return lambda shape, case: sum((formula(shape, case) for formula in formulas), Work(0.0, 0.0))


def _counterfactual_work(shape: Shape, case: Case) -> Work:
    pairs = earlier_pairs(case, shape.chunk_size) * case.sampled
    return softmax_work(shape, case, (1, 1), (2, 2) if case.sampled else (0, 0), pairs)


def _grid(names: str, rows: Sequence[tuple[int, ...]]) -> tuple[dict[str, int], ...]:
    return tuple(dict(zip(names.split(), row, strict=True)) for row in rows)


_TILES = "BLOCK_M BLOCK_N num_warps num_stages"
_COLUMNS = "BV num_warps num_stages"
_KEYS = "BK num_warps num_stages"

# Candidates that Triton 3.6 miscompiles on Hopper (few columns, or one tile of 64 rows over too many warps) are left
# out: they break the device.
SOFTMAX_KERNELS = (
    KernelSpec("routing_kept_chunks"),
    KernelSpec(
        "softmax_forward",
        work=softmax_forward,
        candidates=_grid(f"{_TILES} maxnreg", [
            (128, 64, 8, 3, 255), (128, 64, 8, 2, 128), (64, 64, 4, 2, 168), (64, 64, 4, 3, 168), (64, 64, 4, 2, 255),
            (64, 32, 4, 3, 168), (64, 32, 4, 3, 128),
        ]),
    ),
    KernelSpec(
        "softmax_dq",
        in_backward=True,
        work=lambda shape, case: softmax_work(shape, case, (2, 1), (3, 3)),
        candidates=_grid(_TILES, [(128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3)]),
    ),
    KernelSpec(
        "softmax_dkv",
        in_backward=True,
        work=lambda shape, case: softmax_work(shape, case, (2, 2), (3, 3)),
        candidates=_grid(_TILES, [
            (64, 128, 8, 2), (32, 128, 8, 3), (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 3),
        ]),
    ),
    KernelSpec(
        "softmax_counterfactual",
        in_backward=True,
        work=_counterfactual_work,
        candidates=_grid(_TILES, [(128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3)]),
        counterfactual=True,
    ),
)  # fmt: skip

DELTA_KERNELS = (
    KernelSpec(  # q, k → W, Qe, A, P, PA
        "delta_prepare",
        work=lambda shape, case: delta_work(shape, case, (0, 0, 4, 3), (4, 0, 3, 0)),
        candidates=_grid(_KEYS, [(32, 4, 1), (64, 4, 1), (128, 4, 1)]),
    ),
    KernelSpec("delta_gaps"),
    KernelSpec(  # only written chunks: k, W, v, A → S; its blocks follow from the number of heads and sequences
        "delta_scan",
        work=lambda shape, case: delta_work(
            shape, case, (2 * case.written, case.written, 0, 0), (2 * case.written, *[case.written] * 3)
        ),
    ),
    KernelSpec(  # Qe, v, PA, S → o
        "delta_output",
        work=lambda shape, case: delta_work(shape, case, (1, 1, 0, 0), (1, 2, 1, case.written)),
        candidates=_grid(_COLUMNS, [(64, 4, 2), (128, 4, 2), (128, 8, 2)]),
    ),
    KernelSpec(  # k, W, Qe, dO → dS
        "delta_backward_scan",
        in_backward=True,
        work=lambda shape, case: delta_work(shape, case, (3, 0, 0, 0), (3, 1, 0, 1)),
        candidates=_grid(_COLUMNS, [(32, 4, 2), (32, 4, 3), (64, 4, 2), (64, 4, 3)]),
    ),
    KernelSpec(  # k, W, v, dO, A, P, S, dS → dv, dP, dA and what queries, W and keys get through the states
        "delta_backward",
        in_backward=True,
        work=lambda shape, case: delta_work(shape, case, (5, 5, 0, 0), (5, 3, 4, 1 + case.written)),
        candidates=_grid(f"{_COLUMNS} FUSED", [
            (32, 8, 1, 1), (32, 8, 2, 1), (32, 8, 3, 1), (64, 8, 1, 1), (64, 8, 2, 0),
        ]),
    ),
    KernelSpec(  # q, k, those three, A, P, dA, dP → dq, dk
        "delta_backward_finish",
        in_backward=True,
        work=lambda shape, case: delta_work(shape, case, (0, 0, 7, 2), (7, 0, 4, 0)),
        candidates=_grid(_KEYS, [(32, 4, 1), (64, 4, 1), (64, 8, 1), (128, 8, 1)]),
    ),
)  # fmt: skip

MIX_KERNELS = (
    KernelSpec(
        "mix_forward",
        work=mix_forward,
        candidates=_grid("BLOCK_ROWS num_warps", [(8, 4), (16, 4), (16, 8), (32, 8)]),
    ),
    KernelSpec(
        "mix_backward",
        in_backward=True,
        work=mix_backward,
        candidates=_grid("BLOCK_ROWS num_warps PROGRAMS", [
            (8, 4, 2), (8, 4, 4), (8, 8, 4), (16, 8, 2), (16, 8, 4),
        ]),
    ),
)  # fmt: skip

OPS: dict[str, OpSpec] = {
    spec.name: spec
    for spec in (
        OpSpec(
            "routed_softmax",
            inputs=("q_softmax", "k_softmax", "v", "route"),
            call=_call_softmax,
            limits=(softmax.LIMITS,),
            kernels=SOFTMAX_KERNELS,
            work=OpWork(softmax_forward, softmax_backward),
            packs=True,
            computed_route=1,
        ),
        OpSpec(
            "routed_delta_rule",
            inputs=_DELTA,
            call=_call_delta,
            limits=(delta.LIMITS,),
            kernels=DELTA_KERNELS,
            work=OpWork(delta_forward, delta_backward),
            packs=True,
            computed_route=0,
        ),
        OpSpec(
            "branches",
            inputs=_BRANCHES,
            call=_call_branches,
            limits=(branches.LIMITS,),
            work=OpWork(_sum(softmax_forward, delta_forward), _sum(softmax_backward, delta_backward)),
            packs=True,
            fixed_routes=True,
        ),
        OpSpec(
            "routed_mix",
            inputs=_MIX,
            call=_call_mix,
            limits=(mix.LIMITS,),
            kernels=MIX_KERNELS,
            work=OpWork(mix_forward, mix_backward),
        ),
        OpSpec("gated_norm", inputs=_GATED_NORM, call=_call_gated_norm, limits=(mix.LIMITS,), kernels=MIX_KERNELS),
        OpSpec(
            "layer",
            inputs=(*_BRANCHES, "gate", "mix_logits", "weight_delta", "weight_softmax"),
            call=_call_layer,
            limits=(branches.LIMITS, mix.LIMITS),
            work=OpWork(
                _sum(softmax_forward, delta_forward, mix_forward), _sum(softmax_backward, delta_backward, mix_backward)
            ),
            packs=True,
            checked=False,  # after a norm, a small row's rounding is no longer small beside the largest entry
        ),
    )
}


def kernels() -> Iterator[KernelSpec]:
    """Every kernel of the ops, each once."""
    yield from {kernel.name: kernel for spec in OPS.values() for kernel in spec.kernels}.values()
