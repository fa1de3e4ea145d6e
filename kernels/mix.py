"""``routed_mix``: norm, weigh and gate the outputs of the two memories."""

from __future__ import annotations

from torch import Tensor

from natsl.kernels import reference
from natsl.kernels.dispatch import check_shape, check_tensors, resolve


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
    resolve(backend, op, o_delta.device, triton_ready=False)
    return reference.routed_mix(o_delta, o_softmax, gate, mix_logits, weight_delta, weight_softmax, eps)
