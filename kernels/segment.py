"""Segments: new tokens of sequences that stand at different places inside their chunk.

Shapes: B batch, T new tokens, C chunk size. Row b has start[b] tokens in its open chunk already, 0 ≤ start < C, and
brings lengths[b] ≤ T real tokens, right-padded. Its chunk 0 is the open one; N = ``touched_chunks(T, C)`` bounds how
many chunks any row touches, so that all shapes are static. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


def running_sum(x: Tensor) -> Tensor:
    """Sum of the chunks up to each one, int64 [B,N,R]: a scan along neighbouring numbers, which is far faster."""
    total: Tensor = x.transpose(1, 2).contiguous().cumsum(2).transpose(1, 2)
    return total


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


@dataclass(frozen=True)
class Part:
    """Tokens of some rows that are whole chunks, or inside one: what a kernel for plain sequences takes in one call.

    Where all rows have the same part, ``tokens`` and ``chunks`` are slices of each row and the rest is None. Else they
    are int64 indices into [B·T] and [B·N], of the ``rows`` int64 [S] one after another, packed at ``cu_seqlens`` int32
    [S+1].
    """

    tokens: slice | Tensor
    chunks: slice | Tensor
    rows: Tensor | None = None
    cu_seqlens: Tensor | None = None
    most: int = 0  # tokens of one of the rows

    @property
    def of_rows(self) -> slice | Tensor:
        """Index of its rows."""
        return slice(None) if self.rows is None else self.rows

    def take(self, x: Tensor) -> Tensor:
        """Its tokens of x [B,T,…]: [B,·,…], or packed [1,·,…]."""
        return _taken(x, self.tokens)

    def take_chunks(self, x: Tensor) -> Tensor:
        """Its chunks of x [B,N,…], likewise."""
        return _taken(x, self.chunks)

    def put(self, x: Tensor, y: Tensor) -> None:
        """Write y, shaped as ``take`` gives it, to its tokens of x [B,T,…], which is contiguous."""
        if isinstance(self.tokens, slice):
            x[:, self.tokens] = y
        else:
            x.flatten(0, 1)[self.tokens] = y[0]

    def sums(self, x: Tensor) -> Tensor:
        """Sums over its tokens of x [B,T,R], each row by itself: [S,R]. For few tokens of each."""
        y = self.take(x)
        if self.cu_seqlens is None:
            return y.sum(1)
        place = torch.arange(self.most, device=x.device)
        real = place < self.cu_seqlens.diff()[:, None]  # [S,most]
        index = (self.cu_seqlens[:-1, None] + place).clamp(max=y.shape[1] - 1)
        return y[0, index.long()].masked_fill(~real[..., None], 0.0).sum(1)


def _taken(x: Tensor, index: slice | Tensor) -> Tensor:
    return x[:, index] if isinstance(index, slice) else x.flatten(0, 1)[index][None]


@dataclass(frozen=True)
class Split:
    """New tokens by what they are in their chunks; made by ``split``, None where no row has any.

    ``head``: those of an open chunk that has tokens already, which ``completes`` it, bool [rows of the head], or not.
    ``body``: complete chunks. ``tail``: those of the chunk that is open then.
    """

    head: Part | None
    completes: Tensor | None
    body: Part | None
    tail: Part | None

    @property
    def at_border(self) -> bool:
        """Whether all rows begin at a border and bring as many tokens."""
        parts = (self.body, self.tail)
        return self.head is None and all(part is None or part.cu_seqlens is None for part in parts)


def split(start: Sequence[int], lengths: Sequence[int], tokens: int, chunk_size: int, device: torch.device) -> Split:
    """Split a call of T = ``tokens`` columns, whose rows have start[b] tokens before and bring lengths[b]."""
    N = touched_chunks(tokens, chunk_size)
    heads = [min(n, chunk_size - s) if s else 0 for s, n in zip(start, lengths, strict=True)]
    bodies = [(n - head) // chunk_size * chunk_size for n, head in zip(lengths, heads, strict=True)]
    tails = [n - head - body for n, head, body in zip(lengths, heads, bodies, strict=True)]
    first = [1 if s else 0 for s in start]  # chunk of the body
    uniform = len(set(start)) == len(set(lengths)) == 1

    def part(begins: list[int], counts: list[int], chunk: list[int]) -> Part | None:
        rows = [row for row, count in enumerate(counts) if count]
        if not rows:
            return None
        chunks = [-(-counts[row] // chunk_size) for row in rows]
        if uniform:
            return Part(slice(begins[0], begins[0] + counts[0]), slice(chunk[0], chunk[0] + chunks[0]))

        def spans(size: int, offsets: list[int], many: list[int]) -> Tensor:
            found = [torch.arange(n) + row * size + offsets[row] for row, n in zip(rows, many, strict=True)]
            return torch.cat(found).to(device)

        sizes = [counts[row] for row in rows]
        borders = torch.tensor([0, *sizes]).cumsum(0).to(device, torch.int32)
        index = torch.tensor(rows).to(device)
        return Part(spans(tokens, begins, sizes), spans(N, chunk, chunks), index, borders, max(sizes))

    head = part([0] * len(start), heads, [0] * len(start))
    completes = [s + n == chunk_size for s, n in zip(start, heads, strict=True) if n]
    last = [a + b // chunk_size for a, b in zip(first, bodies, strict=True)]
    ends_at = [a + b for a, b in zip(heads, bodies, strict=True)]
    return Split(
        head,
        torch.tensor(completes).to(device) if head is not None else None,
        part(heads, bodies, first),
        part(ends_at, tails, last),
    )


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
