"""Many tensors in one allocation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ALIGNMENT = 512  # bytes, as torch's own allocations


def aligned(length: int) -> int:
    """``length`` in bytes, rounded up to the alignment."""
    return -(-length // ALIGNMENT) * ALIGNMENT


class Layout:
    """Places of tensors with the given shapes and dtypes in one buffer of ``size`` bytes."""

    def __init__(self, *parts: tuple[tuple[int, ...], torch.dtype]) -> None:
        self._parts = []
        self.size = 0
        for shape, dtype in parts:
            length = math.prod(shape) * dtype.itemsize
            self._parts.append((slice(self.size, self.size + length), shape, dtype))
            self.size += aligned(length)

    def split(self, buffer: Tensor) -> list[Tensor]:
        """The tensors in ``buffer``, uint8 [size]."""
        return [buffer[place].view(dtype).view(shape) for place, shape, dtype in self._parts]
