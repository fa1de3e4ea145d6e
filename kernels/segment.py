"""Segments: new tokens of sequences that stand at different places inside their chunk.

Shapes: B batch, T new tokens, C chunk size. Row b has start[b] tokens in its open chunk already, 0 ≤ start < C, and
brings lengths[b] ≤ T real tokens, right-padded. Its chunk 0 is the open one; N = ``touched_chunks(T, C)`` bounds how
many chunks any row touches, so that all shapes are static. Nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from natsl.kernels.dispatch import check_shape


def touched_chunks(tokens: int, chunk_size: int) -> int:
    """Most chunks that ``tokens`` ≥ 1 new tokens touch, the open one included, wherever in it they start."""
    return (tokens + chunk_size - 2) // chunk_size + 1


def slots(start: Tensor, tokens: int) -> Tensor:
    """Slot of each new token, counted from the first slot of the open chunk: start [B] int64 → int64 [B,T]."""
    return start[:, None] + torch.arange(tokens, device=start.device)


def ends(start: Tensor, tokens: int, lengths: Tensor | None = None) -> Tensor:
    """Slots filled after the call, counted from the first slot of the open chunk: start [B] int64 → int64 [B]."""
    return start + (tokens if lengths is None else lengths)


def closed_chunks(start: Tensor, tokens: int, chunk_size: int, lengths: Tensor | None = None) -> Tensor:
    """Which of the touched chunks are complete after the call: start, lengths [B] int64 → bool [B,N]."""
    n = torch.arange(touched_chunks(tokens, chunk_size), device=start.device)
    return n < (ends(start, tokens, lengths) // chunk_size)[:, None]


def real_tokens(tokens: int, lengths: Tensor) -> Tensor:
    """Which tokens are no padding: lengths [B] int64 → bool [B,T]."""
    return torch.arange(tokens, device=lengths.device) < lengths[:, None]


def align(x: Tensor, start: Tensor, chunk_size: int, lengths: Tensor | None = None) -> Tensor:
    """Chunks of the new tokens: x [B,T,…] → [B,N,C,…], token t of row b at slot start[b] + t and zeros elsewhere.

    Padding, whatever it holds, becomes zeros too.
    """
    B, T = x.shape[:2]
    N = touched_chunks(T, chunk_size)
    token = torch.arange(N * chunk_size, device=x.device) - start[:, None]
    real = (token >= 0) & (token < (T if lengths is None else lengths[:, None]))
    # an index and not a gather: the gradient of a gather adds atomically
    aligned = x[torch.arange(B, device=x.device)[:, None], token.clamp(0, T - 1)]
    real = real.view(B, N * chunk_size, *(1,) * (x.dim() - 2))
    return torch.where(real, aligned, 0).view(B, N, chunk_size, *x.shape[2:])


def unalign(x: Tensor, start: Tensor, tokens: int) -> Tensor:
    """Inverse of ``align``: x [B,N,C,…] → [B,T,…] for T = ``tokens``; a padding token gets what is at its slot."""
    return x.flatten(1, 2)[torch.arange(x.shape[0], device=x.device)[:, None], slots(start, tokens)]


def check_counts(op: str, counts: dict[str, Tensor | None], device: torch.device, shape: tuple[int, ...]) -> None:
    """Raise ``ValueError`` naming the one that is neither None nor an int64 tensor of this shape on the device."""
    for name, count in counts.items():
        if count is None:
            continue
        if not isinstance(count, Tensor) or count.dtype is not torch.int64:
            kind = count.dtype if isinstance(count, Tensor) else type(count).__name__
            raise ValueError(f"{op}: {name} must be an int64 tensor, found {kind}")
        if count.device != device:
            raise ValueError(f"{op}: {name} is on {count.device}, expected {device}")
        check_shape(op, name, count, shape)
