"""What a model keeps of the tokens that it has read, so that a later call goes on where this one ended.

Shapes: B sequences, C chunk size, D width, R routing heads, G softmax heads per routing head, K, V key and value width
of a routing head, W width of the convolution, M pages. Source: docs/method.md, "Padding, packing, pieces".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from natsl.config import ModelConfig
from natsl.kernels.delta import DeltaState
from natsl.kernels.pages import KeyPages, paged_softmax, write_chunks
from natsl.kernels.segment import closed_chunks
from natsl.space.policy import Op


@dataclass
class LayerCache:
    """State of one layer; what its kind has no use for is None.

    ``tail`` [B,W−1,channels]: the last inputs of the convolution. ``total`` [B,D], at least float32: sum of the
    router's inputs over the open chunk. ``delta``: the state of the delta rule. ``pages``: keys and values of the kept
    chunks and of the open one, with the number kept, which caps and the mix count on.
    """

    tail: Tensor
    total: Tensor | None
    delta: DeltaState | None
    pages: KeyPages | None
    _free: int = 0  # chunks that can be completed before pages may run out
    _tokens: int = 0  # read one at a time since that was counted

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, route: Tensor, start: Tensor, chunk_size: int, lengths: Tensor | None
    ) -> Tensor:
        """Softmax over kept chunks and the own one, [B,T,Hs,Vs]; new keys and values are added to ``pages``."""
        assert self.pages is not None
        o = paged_softmax(q, k, v, route, self.pages, start, chunk_size=chunk_size, lengths=lengths)
        closed = closed_chunks(start, q.shape[1], chunk_size, lengths)[..., None]
        self._make_room(self.pages.kept + (closed & (route > 0.5)).sum(1), q.shape[1], chunk_size)
        self.pages = write_chunks(self.pages, k, v, route, start, chunk_size=chunk_size, lengths=lengths)
        return o

    def _make_room(self, kept: Tensor, tokens: int, chunk_size: int) -> None:
        """Give ``pages`` what it needs to keep ``kept`` [B,R] chunks and the open ones, after a call of ``tokens``.

        Waits for the device, for single tokens at most once in a chunk.
        """
        assert self.pages is not None
        self._tokens += tokens
        if tokens == 1 and -(-self._tokens // chunk_size) <= self._free:
            return
        heads, pages, places = kept.numel(), self.pages.keys.shape[0], self.pages.table.shape[2]
        used, most = torch.stack((kept.sum() + heads + 1, kept.max() + 1)).tolist()
        # room for one more chunk of every head, and a fourth of all there is: what has to grow is copied
        if pages < used + heads:
            pages = max(used + heads, pages + pages // 4)
        if places < most + 1:
            places = max(most + 1, 2 * places)
        self.pages = self.pages.grow(pages, places)
        self._free, self._tokens = min((pages - used) // heads, places - most), 0


class Cache:
    """State of sequences under one model, made by ``RoutedLM.new_cache``; ``forward`` goes on from it and updates it.

    ``lengths`` int64 [B]: tokens read of each sequence. ``layers``: the state of each layer. Keys and values are in
    pages of a chunk: each head of a row has those that it keeps and one for the open chunk, and a layer up to one more
    for each and a fourth more in all. They are written in place: ``copy.deepcopy`` makes a cache that goes its own way.
    A call that fails leaves a cache that no call takes.
    """

    def __init__(self, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        if batch < 1:
            raise ValueError(f"batch = {batch} is not allowed: it must be ≥ 1")
        c, precise = config, torch.promote_types(dtype, torch.float32)
        G = c.softmax_per_head

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(batch, *shape, device=device, dtype=dtype)

        self.config = config
        self.lengths = zeros(dtype=torch.int64)
        self.layers = [
            LayerCache(
                tail=zeros(c.conv_width - 1, c.heads * (2 * c.key_dim + c.value_dim)),
                total=zeros(c.width, dtype=precise) if kind is Op.routed else None,
                delta=None
                if kind is Op.softmax
                else DeltaState.zeros(batch, c.heads, c.key_dim, c.value_dim, device=device, dtype=precise),
                pages=None
                if kind is Op.delta
                else KeyPages.empty(
                    zeros(1, c.softmax_heads, c.key_dim // G),
                    zeros(1, c.softmax_heads, c.value_dim // G),
                    c.heads,
                    c.chunk_size,
                ),
            )
            for kind in c.layers
        ]
        self._usable = True

    def check(self, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        """Raise ``ValueError`` unless it can go on with a batch of this size on this device."""
        if not self._usable:
            raise ValueError("the cache is unusable: the last call with it failed")
        if self.config != config:
            raise ValueError("the cache is of a model of another shape")
        if self.layers[0].tail.dtype != dtype:
            raise ValueError(f"the cache is in {self.layers[0].tail.dtype}, but the model computes in {dtype}")
        if len(self.lengths) != batch:
            raise ValueError(f"the cache holds {len(self.lengths)} sequences, not {batch}")
        if self.lengths.device != device:
            raise ValueError(f"the cache is on {self.lengths.device}, but tokens are on {device}")

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors, free pages included."""
        found = [self.lengths]
        for layer in self.layers:
            for part in (layer.tail, layer.total, layer.delta, layer.pages):
                found += [part] if isinstance(part, Tensor) else [x for x in part or () if isinstance(x, Tensor)]
        return sum(x.numel() * x.element_size() for x in found)

    @contextmanager
    def advancing(self, tokens: Tensor | int) -> Iterator[None]:
        """While layers update their states; afterwards each sequence has read ``tokens`` (int64 [B] or a number)."""
        self._usable = False
        yield
        self.lengths = self.lengths + tokens
        self._usable = True
