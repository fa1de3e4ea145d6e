"""Where the sequences of a call are in its tokens: one per row, padded, or packed one after another.

Shapes: B batch, T tokens, C chunk size, N chunks, S sequences (B, or the packed ones), M most chunks of one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from natsl.kernels.segment import Split, real_tokens, slots


@dataclass(frozen=True)
class Packing:
    """Tables of packed sequences, which follow one another in a batch of one row; chunks start anew at each.

    ``cu_seqlens`` int32 [S+1]: borders of the sequences. Of every token [T] int64: its ``sequence``, its ``position``
    in it and its ``chunk`` among all. Of every chunk [N] int64: its ``chunk_sequence``, its ``chunk_index`` in it, its
    ``first`` token and its ``size`` in tokens. ``most``: M.
    """

    chunk_size: int
    cu_seqlens: Tensor
    sequence: Tensor
    position: Tensor
    chunk: Tensor
    chunk_sequence: Tensor
    chunk_index: Tensor
    first: Tensor
    size: Tensor
    most: int

    def chunk_rows(self, x: Tensor) -> Tensor:
        """The chunks of each sequence in a row of their own, [1,N,…] → [S,M,…], zeros past their last."""
        rows = x.new_zeros(self.cu_seqlens.shape[0] - 1, self.most, *x.shape[2:])
        return rows.index_put((self.chunk_sequence, self.chunk_index), x[0])

    def pack_rows(self, rows: Tensor) -> Tensor:
        """Reverses ``chunk_rows``."""
        return rows[self.chunk_sequence, self.chunk_index][None]

    def chunk_means(self, x: Tensor) -> Tensor:
        """Mean of x [1,T,D] over the tokens of each chunk, [1,N,D]."""
        slot = torch.arange(self.chunk_size, device=x.device)
        real = slot < self.size[:, None]  # [N,C]
        tokens = x[0, (self.first[:, None] + slot).clamp(max=x.shape[1] - 1)]
        total = tokens.masked_fill(~real[..., None], 0.0).sum(1)
        return (total / self.size[:, None].to(x.dtype))[None]


@dataclass(frozen=True)
class Layout:
    """Which tokens of a call are real and which belong together; made by ``padded`` or ``packed``.

    ``lengths`` int64 [S]: real tokens of each sequence, None: all. ``order`` int64 [B,T]: the column that comes at each
    place once the padding is on the right, None: it is there already. ``packing``: tables of packed sequences, else
    None. Set by ``RoutedLM.forward`` from a cache: ``read`` int64 [B], the tokens of each sequence that it holds,
    ``start`` int64 [B], those of them in the open chunk, and ``parts``, where new tokens are in their chunks.
    """

    lengths: Tensor | None = None
    order: Tensor | None = None
    packing: Packing | None = None
    read: Tensor | None = None
    start: Tensor | None = None
    parts: Split | None = None

    @staticmethod
    def padded(mask: Tensor) -> Layout:
        """Rows whose real tokens are where ``mask`` [B,T] is true: padding on the left, the right or both sides.

        Raises ``ValueError`` for a row whose real tokens are not contiguous. Waits for the device.
        """
        if mask.dim() != 2 or 0 in mask.shape or mask.is_floating_point():  # added to scores, −inf would mean padding
            form = f"{mask.dtype} {tuple(mask.shape)}"
            raise ValueError(f"mask must be boolean or integer [batch ≥ 1, tokens ≥ 1], found {form}")
        mask = mask.bool()
        lengths = mask.sum(1)
        place = torch.arange(mask.shape[1], device=mask.device)
        order = (place + mask.int().argmax(1)[:, None]) % mask.shape[1]
        if bool((mask.gather(1, order) != (place < lengths[:, None])).any()):
            raise ValueError("mask has holes: the real tokens of a row must be contiguous")
        return Layout(lengths, order)

    @staticmethod
    def packed(lengths: Sequence[int], chunk_size: int, device: torch.device | str = "cpu") -> Layout:
        """Sequences of these lengths, in tokens, one after another in a single row; ``chunk_size`` is the model's.

        Raises ``ValueError`` for no sequence and for one without tokens.
        """
        if not lengths or not all(isinstance(length, int) and length >= 1 for length in lengths):
            raise ValueError(f"lengths = {list(lengths)} must have at least one entry, each an integer ≥ 1")
        if chunk_size < 1:
            raise ValueError(f"chunk_size = {chunk_size} must be ≥ 1")
        sizes = torch.tensor(lengths)
        chunks = (sizes + chunk_size - 1) // chunk_size
        ends, chunk_ends = sizes.cumsum(0), chunks.cumsum(0)
        sequence = torch.arange(len(sizes)).repeat_interleave(sizes)
        position = torch.arange(int(ends[-1])) - (ends - sizes)[sequence]
        chunk_sequence = torch.arange(len(sizes)).repeat_interleave(chunks)
        chunk_index = torch.arange(int(chunk_ends[-1])) - (chunk_ends - chunks)[chunk_sequence]
        before = chunk_index * chunk_size  # tokens of the sequence
        tables = Packing(
            chunk_size,
            torch.cat((ends.new_zeros(1), ends)).to(torch.int32).to(device),
            sequence.to(device),
            position.to(device),
            ((chunk_ends - chunks)[sequence] + position // chunk_size).to(device),
            chunk_sequence.to(device),
            chunk_index.to(device),
            ((ends - sizes)[chunk_sequence] + before).to(device),
            (sizes[chunk_sequence] - before).clamp(max=chunk_size).to(device),
            int(chunks.max()),
        )
        return Layout(sizes.to(device), None, tables)

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """Position of each of ``tokens`` columns in its sequence, int64 [B,T], or [1,T] where all rows agree."""
        if self.packing is not None:
            return self.packing.position[None]
        return torch.arange(tokens, device=device)[None] if self.read is None else slots(self.read, tokens)

    def spread(self, x: Tensor, tokens: int, chunk_size: int) -> Tensor:
        """A value of every chunk for each of ``tokens`` columns: [B,N,…] → [B,T,…]."""
        if self.packing is not None:
            return x[:, self.packing.chunk]
        if self.start is None or self.at_border:
            return x.repeat_interleave(chunk_size, 1)[:, :tokens]
        chunk = slots(self.start, tokens) // chunk_size
        return x[torch.arange(len(x), device=x.device)[:, None], chunk]

    @property
    def at_border(self) -> bool:
        """Whether it is known that all rows begin at a border of chunks and bring as many tokens."""
        return self.parts is not None and self.lengths is None and self.parts.at_border

    def to_right(self, x: Tensor) -> Tensor:
        """x [B,T] with its padding on the right."""
        return x if self.order is None else x.gather(1, self.order)

    def scored(self, targets: Tensor, ignored: int) -> Tensor:
        """``targets`` [B,T] with the padding on the right, which is ``ignored``."""
        targets = self.to_right(targets)
        if self.lengths is None or self.packing is not None:
            return targets
        return targets.masked_fill(~real_tokens(targets.shape[1], self.lengths), ignored)

    def restore(self, x: Tensor) -> Tensor:
        """x [B,T,…] whose padding is on the right, with every token in its own column again."""
        if self.order is None:
            return x
        order = self.order.view(*self.order.shape, *[1] * (x.dim() - 2)).expand_as(x)
        return torch.empty_like(x).scatter_(1, order, x)

    def last(self, x: Tensor, count: int) -> Tensor:
        """The last ``count`` real tokens of each sequence, [B,T,…] → [S,count,…], padding being on the right.

        What a shorter sequence gets in the first places is unspecified.
        """
        if self.lengths is None:
            return x[:, -count:]
        back = torch.arange(-count, 0, device=x.device)
        if self.packing is None:
            columns = (self.lengths[:, None] + back).clamp(min=0)
            return x[torch.arange(len(x), device=x.device)[:, None], columns]
        return x[0, (self.packing.cu_seqlens[1:, None] + back).clamp(min=0)]

    def check(self, tokens: Tensor, chunk_size: int) -> None:
        """Raise ``ValueError`` unless it is of ``tokens`` [B,T] and of chunks of this size."""
        shape = tuple(tokens.shape)
        if self.order is not None and tuple(self.order.shape) != shape:
            raise ValueError(f"layout is of a mask {tuple(self.order.shape)}, but tokens are {shape}")
        if self.packing is not None:
            if self.packing.chunk_size != chunk_size:
                raise ValueError(f"layout is of chunks of {self.packing.chunk_size} tokens, not {chunk_size}")
            if shape != (1, len(self.packing.sequence)):
                raise ValueError(
                    f"layout packs {len(self.packing.sequence)} tokens into one row, but tokens are {shape}"
                )
        elif self.lengths is not None and tuple(self.lengths.shape) != shape[:1]:
            raise ValueError(f"layout has lengths {tuple(self.lengths.shape)}, but tokens are {shape}")
        if self.lengths is not None and self.lengths.device != tokens.device:
            raise ValueError(f"layout is on {self.lengths.device}, but tokens are on {tokens.device}")
