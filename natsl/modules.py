"""The parts around the routed ops: short convolution, RMS norm, SwiGLU, dense attention, the output layer's loss.

This is the one place that chooses who computes them: on CUDA the kernels of fla-core (attention: cuDNN), torch
elsewhere. While ``torch.compile`` traces it is torch too: the compiler fuses these parts itself, and the library's own
dispatch would break its graph. Only the convolution stays the library's, as an op of its own: the compiler's takes
twice the time.

Shapes: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, reduce
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from natsl.kernels.launch.library import register
from natsl.kernels.mix import NORM_LIMITS
from natsl.kernels.mix import rms_norm as inference_norm

LOGITS_AT_ONCE = 1 << 28  # beyond it the loss goes over the tokens in parts, and the backward pass makes logits again
_MASK_AT_ONCE = 1 << 20  # entries of the attention mask of explicit visibility
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# cuDNN first: it takes keys and values of different widths; each of the others takes what those before it do not
_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

# The library measures dozens of launch configurations of each kernel at its first call, and takes whichever was the
# fastest then: that costs minutes, and two runs may add in different orders. One of its configurations is enough.
_LAUNCH: dict[str, tuple[dict[str, int], int]] = {
    "causal_conv1d_fwd_kernel": ({"BD": 64}, 8),
    "causal_conv1d_bwd_kernel": ({"BD": 64}, 8),
    "layer_norm_fwd_kernel": ({"BT": 32}, 8),
    "layer_norm_fwd_kernel_row": ({}, 4),
    "layer_norm_bwd_kernel": ({"BT": 32}, 8),
    "layer_norm_bwd_kernel_row": ({}, 4),
    "swiglu_fwd_kernel": ({"B": 1024}, 4),
    "swiglu_fwdbwd_kernel": ({"B": 1024}, 4),
}


@dataclass(frozen=True)
class _Library:
    convolution: Callable[..., Any]
    convolution_backward: Callable[..., Any]
    rms_norm: Callable[..., Any]
    swiglu: Callable[..., Any]
    cross_entropy: Callable[..., Any]


def import_library() -> None:
    """Import the library before the first pass does, which takes seconds. Where it cannot be had, that pass says so."""
    with contextlib.suppress(ImportError):
        import_module("fla.modules")


@cache
def _load() -> _Library | None:
    """The library's functions (None, with a warning, where it cannot be had)."""
    try:
        from fla.modules.activations import ops as activations
        from fla.modules.causal_conv1d import ops as convolution
        from fla.modules.fused_cross_entropy.ops import cross_entropy_loss
        from fla.modules.norm import layernorm

        library = _Library(
            convolution.causal_conv1d_fwd,
            convolution.causal_conv1d_bwd,
            layernorm.rms_norm,
            activations.swiglu,
            cross_entropy_loss,
        )
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"fla-core cannot be used ({error}): norms, convolutions and losses run on slower torch code; "
            "pip install 'natsl[cuda]' adds it",
            stacklevel=2,
        )
        return None
    modules = (convolution, layernorm, activations)
    for name, (block, warps) in _LAUNCH.items():
        if not sum(_settle(getattr(module, name, None), block, warps) for module in modules):
            warnings.warn(f"fla-core's {name} is tuned anew in every process: its configurations changed", stacklevel=2)
    return library


def _settle(kernel: Any, block: dict[str, int], warps: int) -> bool:
    """Leave an autotuned kernel one of its configurations. One that does not have it stays as it is: False."""
    while kernel is not None and not hasattr(kernel, "configs"):
        kernel = getattr(kernel, "fn", None)
    same = [] if kernel is None else [c for c in kernel.configs if c.kwargs == block and c.num_warps == warps]
    if same:
        kernel.configs = same[:1]
    return bool(same)


def _suits(x: Tensor) -> bool:
    """Whether the library's kernels take ``x``."""
    return x.device.type == "cuda" and x.dtype in _DTYPES


def _library(x: Tensor) -> _Library | None:
    """What computes on ``x``: the library, or None for torch."""
    if not _suits(x) or torch.compiler.is_compiling():
        return None
    return _load()


def short_convolution(x: Tensor, weight: Tensor, positions: Tensor | None = None) -> Tensor:
    """SiLU of the causal depthwise convolution: x [B,T,channels], weight [channels,width] → like x.

    The last tap sees the token itself. ``positions`` [T]: of each token in its sequence, where several are packed; no
    tap sees past the start of its own.
    """
    if positions is not None:
        return F.silu(_packed_convolution(x, weight, positions)).to(x.dtype)
    if _suits(x) and _is_loaded():
        y: Tensor = _Convolution.apply(x, weight.contiguous())  # type: ignore[no-untyped-call]
        return y
    taps = weight.to(x.dtype)
    width = taps.shape[1]
    if torch.compiler.is_compiling():  # shifted products, which the compiler makes one kernel of
        padded = F.pad(x, (0, 0, width - 1, 0))
        products = [padded[:, i : i + x.shape[1]] * taps[:, i] for i in range(width)]
        return F.silu(reduce(torch.add, products))  # torch.sum would be float32 under autocast
    padded = F.pad(x.transpose(1, 2), (width - 1, 0))
    return F.silu(F.conv1d(padded, taps[:, None], groups=taps.shape[0]).transpose(1, 2))


def precise(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _packed_convolution(x: Tensor, taps: Tensor, positions: Tensor) -> Tensor:
    """The convolution before SiLU, at least float32 [B,T,channels]."""
    x = precise(x)
    y = x * taps[:, -1]
    for back in range(1, taps.shape[1]):
        earlier = F.pad(x, (0, 0, back, 0))[:, : x.shape[1]]
        y = y + (earlier * taps[:, -1 - back]).masked_fill((positions < back)[:, None], 0.0)
    return y


def _is_loaded() -> bool:
    return _load() is not None


# What torch.compiler.assume_constant_result does; that would import the whole compiler with every model.
vars(_is_loaded)["_dynamo_marked_constant"] = True


def _run_convolution(x: Tensor, weight: Tensor) -> Tensor:
    return _load().convolution(x, weight, None, None, activation="silu")[0]  # type: ignore[no-any-return, union-attr]


def _run_convolution_backward(dy: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
    dx, dweight, *_ = _load().convolution_backward(x, dy, None, weight, activation="silu")  # type: ignore[union-attr]
    return [dx, dweight]


_convolution = register(
    "short_convolution",
    "(Tensor x, Tensor weight) -> Tensor",
    _run_convolution,
    lambda x, weight: torch.empty_like(x, memory_format=torch.contiguous_format),
)
_convolution_backward = register(
    "short_convolution_backward",
    "(Tensor dy, Tensor x, Tensor weight) -> Tensor[]",
    _run_convolution_backward,
    lambda dy, x, weight: [torch.empty_like(x), torch.empty_like(weight)],
)


class _Convolution(torch.autograd.Function):
    """The library's convolution, opaque to the compiler."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        y: Tensor = _convolution(x, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        dx, dweight = _convolution_backward(dy, *ctx.saved_tensors)
        return dx, dweight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean of squares + eps) · weight over the last dimension, in float32 inside; like x."""
    library = _library(x)
    if library is not None:
        if not torch.is_grad_enabled() and x.shape[-1] <= NORM_LIMITS.largest["width"]:
            return inference_norm(x, weight, eps=eps)  # the library's takes the host several times as long
        return library.rms_norm(x, weight, None, eps=eps)  # type: ignore[no-any-return]
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps).to(x.dtype)


def swiglu(x: Tensor) -> Tensor:
    """SiLU(a) · b with (a, b) the two halves of x's last dimension."""
    a, b = x.chunk(2, -1)
    library = _library(x)
    if library is not None:
        return library.swiglu(a, b)  # type: ignore[no-any-return]
    return F.silu(a) * b


def with_zero_gradients(x: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """x; the parameters get zeros as gradients, as wrappers expect that count the gradients of every step (DDP)."""
    if not parameters:
        return x
    y: Tensor = _ZeroGradients.apply(x, *parameters)  # type: ignore[no-untyped-call]
    return y


class _ZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.kinds = [(parameter.shape, parameter.dtype) for parameter in parameters]
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, ...]:
        return dx, *[dx.new_zeros(shape, dtype=dtype) for shape, dtype in ctx.kinds]


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of every token over itself and all earlier ones; q, k [B,T,H,K], v [B,T,H,V] → [B,T,H,V].

    The gradients of cuDNN may differ in their last bits from run to run.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(_ATTENTION, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def visible_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, chunk_size: int) -> Tensor:
    """Softmax attention of every token over its own chunk, causally, and the earlier chunks that are visible from it.

    q, k [B,T,H,K], v [B,T,H,V] → [B,T,H,V]; visible bool [B,N,N,R] (chunk of the query, earlier chunk), N =
    ceil(T / chunk_size), H a multiple of R. A few chunks of queries at a time, so that the mask stays small.
    """
    B, T, H, _ = q.shape
    N, R = visible.shape[2:]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    chunk = torch.arange(N, device=q.device)
    earlier = visible.movedim(3, 1) & (chunk < chunk[:, None])  # [B,R,N,N]
    size = max(1, _MASK_AT_ONCE // (B * H * T * chunk_size))
    parts = []
    for first in range(0, N, size):
        lo, hi = first * chunk_size, min((first + size) * chunk_size, T)
        row, key = torch.arange(lo, hi, device=q.device)[:, None], torch.arange(hi, device=q.device)
        own = (row // chunk_size == key // chunk_size) & (key <= row)  # [rows,hi]
        mask = earlier[:, :, first : first + size, : first + size]
        mask = mask.repeat_interleave(chunk_size, 3)[..., :hi].repeat_interleave(chunk_size, 2)[:, :, : hi - lo]
        mask = (mask | own).repeat_interleave(H // R, 1)
        parts.append(F.scaled_dot_product_attention(q[:, :, lo:hi], k[:, :, :hi], v[:, :, :hi], attn_mask=mask))
    return torch.cat(parts, 2).transpose(1, 2)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignored: int = -100) -> tuple[Tensor, Tensor]:
    """Loss of the logits ``hidden`` · ``weight``ᵀ and whether the likeliest token is the target.

    hidden [B,T,D], weight [V,D], targets int64 [B,T] (``ignored``: not scored). Returns the loss per token, at least
    float32 [B,T], 0 where nothing is scored, and bool [B,T]. The library makes no float32 copy of half-precision
    logits, and there are never more than about ``LOGITS_AT_ONCE`` logits at a time.
    """
    rows, flat = hidden.flatten(0, 1), targets.flatten()
    size = max(1, LOGITS_AT_ONCE // weight.shape[0])
    if rows.shape[0] <= size:
        loss, right = _cross_entropy(rows, weight, flat, ignored)
    else:
        parts = [
            checkpoint(_cross_entropy, *part, ignored, use_reentrant=False, preserve_rng_state=False)
            for part in zip(rows.split(size), [weight] * -(-rows.shape[0] // size), flat.split(size), strict=True)
        ]
        loss, right = (torch.cat(column) for column in zip(*parts, strict=True))
    return loss.view_as(targets), right.view_as(targets)


def _cross_entropy(rows: Tensor, weight: Tensor, targets: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    logits = F.linear(rows, weight)
    right = logits.detach().argmax(-1) == targets
    library = _library(logits)
    if library is not None:
        loss, _ = library.cross_entropy(logits, targets, ignore_index=ignored)
        return loss, right
    return F.cross_entropy(precise(logits), targets, ignore_index=ignored, reduction="none"), right


class RMSNorm(nn.Module):
    """``rms_norm`` with a learned weight of its own."""

    def __init__(self, width: int, eps: float, gain: float = 1.0) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.full((width,), gain))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """W_out (SiLU(a) · b) with (a, b) = W_in x."""

    def __init__(self, width: int, hidden: int, n_layers: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(width, 2 * hidden, bias=False)
        self.out_proj = nn.Linear(hidden, width, bias=False)
        nn.init.normal_(self.in_proj.weight, std=width**-0.5)
        nn.init.normal_(self.out_proj.weight, std=(2 * n_layers * hidden) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(swiglu(self.in_proj(x)))  # type: ignore[no-any-return]
