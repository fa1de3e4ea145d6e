"""``continued_convolution``: the short convolution of new tokens from the last inputs of those before.

Shapes: B batch, T new tokens, W width of the convolution. Inference only: nothing here has a gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from natsl.kernels.dispatch import Limits, check_shape, check_tensors, last_contiguous, use_kernels
from natsl.kernels.segment import check_counts
from natsl.kernels.shape import LARGEST_GRID

LIMITS = Limits({"sequences": LARGEST_GRID})


@torch.no_grad()
def continued_convolution(
    x: Tensor, weight: Tensor, tail: Tensor, lengths: Tensor | None = None, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """SiLU of the causal depthwise convolution of x, and the inputs that the next call needs.

    x [B,T,channels], any floating dtype; weight [channels,W], whose last tap sees the token itself; tail
    [B,W−1,channels] in x's dtype: the inputs before x (zeros before the first token). lengths [B] int64: tokens of each
    row that are real (right-padded; default all). On Triton: float32, float16 or bfloat16.

    Returns y like x, anything at padding, and the new tail [B,W−1,channels]. Raises ``ValueError`` naming the argument.
    """
    op = "continued_convolution"
    check_tensors(op, {"x": x, "weight": weight, "tail": tail})
    if x.dim() != 3 or weight.dim() != 2 or tail.dtype != x.dtype:
        forms = f"x {x.dtype} {tuple(x.shape)}, weight {tuple(weight.shape)}, tail {tail.dtype}"
        raise ValueError(f"{op}: {forms}: they must be [batch, tokens, channels], [channels, width] and of x's dtype")
    (B, T, channels), W = x.shape, weight.shape[1]
    check_shape(op, "weight", weight, (channels, W))
    check_shape(op, "tail", tail, (B, W - 1, channels))
    check_counts(op, {"lengths": lengths}, x.device, (B,))
    if x.numel() and use_kernels(op, backend, x.device, LIMITS.reason(x.dtype, None, {"sequences": B})):
        from natsl.kernels._triton.convolution import convolve

        found: tuple[Tensor, Tensor] = convolve(last_contiguous(x), weight.contiguous(), tail.contiguous(), lengths)
        return found
    inputs = torch.cat((tail, x), 1)
    y = F.conv1d(inputs.transpose(1, 2), weight.to(x.dtype)[:, None], groups=channels).transpose(1, 2)
    if lengths is None:
        return F.silu(y), inputs[:, T:].clone()
    last = lengths[:, None] + torch.arange(W - 1, device=x.device)  # in ``inputs``
    return F.silu(y), inputs[torch.arange(B, device=x.device)[:, None], last]
