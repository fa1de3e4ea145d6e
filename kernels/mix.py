"""``routed_mix``: norm, weigh and gate the outputs of the two memories; ``gated_norm``: the same with one; a norm."""

from __future__ import annotations

import torch
from torch import Tensor

from natsl.kernels import reference
from natsl.kernels.dispatch import Limits, check_shape, check_tensors, last_contiguous, use_kernels
from natsl.kernels.shape import LARGEST_VALUE_DIM

LIMITS = Limits({"Vs": LARGEST_VALUE_DIM})
NORM_LIMITS = Limits({"width": 1 << 13})


def routed_mix(
    o_delta: Tensor,
    o_softmax: Tensor,
    gate: Tensor,
    mix_logits: Tensor,
    weight_delta: Tensor,
    weight_softmax: Tensor,
    *,
    eps: float,
    backend: str = "auto",
) -> Tensor:
    """y = SiLU(gate) · (w0 · weight_delta · RMS(o_delta) + w1 · weight_softmax · RMS(o_softmax)), (w0, w1) =
    softmax(mix_logits).

    o_delta, o_softmax, gate [B,T,Hs,Vs] of one floating dtype (gate before SiLU); mix_logits [B,T,Hs,2], 0 = delta,
    1 = softmax, already divided by the mix temperature; weights [Vs]; ``eps`` of the norms. Returns y [B,T,Hs,Vs] in
    o_delta's dtype. Raises ``ValueError`` naming the argument. Source: arXiv 2602.03681, section 3.
    """
    op = "routed_mix"
    tensors = {"o_delta": o_delta, "o_softmax": o_softmax, "gate": gate, "mix_logits": mix_logits}
    weights = {"weight_delta": weight_delta, "weight_softmax": weight_softmax}
    check_tensors(op, {**tensors, **weights})
    for name in ("o_softmax", "gate"):
        if tensors[name].dtype != o_delta.dtype:
            raise ValueError(f"{op}: {name} is {tensors[name].dtype}, but o_delta is {o_delta.dtype}")
    if o_delta.dim() != 4:
        raise ValueError(f"{op}: o_delta must be [batch, tokens, heads, width], found {tuple(o_delta.shape)}")
    shape = tuple(o_delta.shape)
    for name, tensor in tensors.items():
        check_shape(op, name, tensor, (*shape[:3], 2) if name == "mix_logits" else shape)
    for name, tensor in weights.items():
        check_shape(op, name, tensor, shape[3:])
    if use_kernels(op, backend, o_delta.device, LIMITS.reason(o_delta.dtype, None, {"Vs": shape[3]})):
        from natsl.kernels._triton import mix as mix_triton

        return mix_triton.routed_mix(o_delta, o_softmax, gate, mix_logits, weight_delta, weight_softmax, eps)
    return reference.routed_mix(o_delta, o_softmax, gate, mix_logits, weight_delta, weight_softmax, eps)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, *, eps: float, backend: str = "auto") -> Tensor:
    """y = SiLU(gate) · weight · RMS(x): the output of a layer with a single memory.

    x and gate [B,T,Hs,Vs] of one floating dtype (gate before SiLU), weight [Vs]; ``eps`` of the norm. Returns y
    [B,T,Hs,Vs] in x's dtype. Raises ``ValueError`` naming the argument.
    """
    op = "gated_norm"
    check_tensors(op, {"x": x, "gate": gate, "weight": weight})
    if gate.dtype != x.dtype:
        raise ValueError(f"{op}: gate is {gate.dtype}, but x is {x.dtype}")
    if x.dim() != 4:
        raise ValueError(f"{op}: x must be [batch, tokens, heads, width], found {tuple(x.shape)}")
    check_shape(op, "gate", gate, tuple(x.shape))
    check_shape(op, "weight", weight, tuple(x.shape[3:]))
    if use_kernels(op, backend, x.device, LIMITS.reason(x.dtype, None, {"Vs": x.shape[3]})):
        from natsl.kernels._triton import mix as mix_triton

        return mix_triton.gated_norm(x, gate, weight, eps)
    return reference.gated_norm(x, gate, weight, eps)


@torch.no_grad()
def rms_norm(x: Tensor, weight: Tensor, *, eps: float, backend: str = "auto") -> Tensor:
    """weight · x / sqrt(mean of squares + eps) over the last dimension, without a gradient.

    x [...,width] of up to four dimensions and any floating dtype, weight [width]; float32 inside, or float64. On
    Triton: float32, float16 or bfloat16 and a width of at most 8192. Returns a tensor like x. Raises ``ValueError``
    naming the argument.
    """
    op = "rms_norm"
    check_tensors(op, {"x": x, "weight": weight})
    if not 1 <= x.dim() <= 4:
        raise ValueError(f"{op}: x must have one to four dimensions, found {tuple(x.shape)}")
    check_shape(op, "weight", weight, tuple(x.shape[-1:]))
    if x.numel() and use_kernels(op, backend, x.device, NORM_LIMITS.reason(x.dtype, None, {"width": x.shape[-1]})):
        from natsl.kernels._triton import mix as mix_triton

        rows = last_contiguous(x)
        while rows.dim() < 4:
            rows = rows.unsqueeze(-2)
        y: Tensor = mix_triton.rms_norm(rows, weight, eps)
        return y.view(x.shape)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (reference.rms_normalise(x.to(dtype), eps) * weight.to(dtype)).to(x.dtype)
