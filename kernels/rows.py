"""``rows_linear``: a few rows times a weight, as in a step of decoding, with the norm before and what comes after it.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from natsl.kernels.dispatch import Limits, check_shape, check_tensors, last_contiguous, use_kernels
from natsl.kernels.reference import rms_normalise

LARGEST_ROWS = 64
LIMITS = Limits({"rows": LARGEST_ROWS, "K": 1 << 16})


@torch.no_grad()
def rows_linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    gated: bool = False,
    residual: Tensor | None = None,
    want_normed: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h weightᵀ for the rows h = RMS-normed x, without a gradient.

    x [M,K]; weight [N,K], contiguous, of the same dtype, complete before the kernel that comes before this call: it is
    read while that one still runs. ``norm`` [K], any floating dtype: weight of the norm (None: h
    = x). ``gated``: weight is [2N,K] and the result SiLU(a) · b of the products a with its first half and b with its
    second. ``residual`` [M,N]: is added. On Triton: float32, float16 or bfloat16, at most 64 rows; ``auto`` takes torch
    beyond, and for several rows without norm or gate.

    Returns y [M,N] in x's dtype and h [M,K] if ``want_normed``, else x. Raises ``ValueError`` naming the
    argument.
    """
    op = "rows_linear"
    tensors = {"x": x, "weight": weight} | ({} if residual is None else {"residual": residual})
    check_tensors(op, tensors)
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or tensor.dtype != x.dtype:
            form = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{op}: {name} is {form}: it must have two dimensions and x's dtype, {x.dtype}")
    (M, K), rows = x.shape, weight.shape[0]
    check_shape(op, "weight", weight, (rows, K))
    if not weight.is_contiguous() or (gated and rows % 2):
        raise ValueError(f"{op}: weight {tuple(weight.shape)} must be contiguous, with an even number of rows if gated")
    if norm is not None:
        check_shape(op, "norm", norm, (K,))
    if residual is not None:
        check_shape(op, "residual", residual, (M, rows // 2 if gated else rows))
    # of several rows, a library's product is faster where nothing comes before it
    plain = backend == "auto" and M > 1 and norm is None and not gated
    if M and not plain and use_kernels(op, backend, x.device, LIMITS.reason(x.dtype, None, {"rows": M, "K": K})):
        from natsl.kernels._triton import rows as on_triton

        residual = None if residual is None else last_contiguous(residual)
        found: tuple[Tensor, Tensor] = on_triton.rows_linear(
            last_contiguous(x), weight, norm, eps, gated, residual, want_normed
        )
        return found
    h = x
    if norm is not None:
        dtype = torch.promote_types(x.dtype, torch.float32)
        h = (rms_normalise(x.to(dtype), eps) * norm.to(dtype)).to(x.dtype)
    if residual is not None and not gated:
        return torch.addmm(residual, h, weight.T), h if want_normed else x
    y = F.linear(h, weight)
    if gated:
        a, b = y.chunk(2, -1)
        y = F.silu(a) * b
    return y if residual is None else residual + y, h if want_normed else x
