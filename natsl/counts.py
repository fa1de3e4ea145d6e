"""What an evaluation counts in every sequence, which adds up to its results.

Shapes: B sequences, T tokens, C chunk size, L layers, R routing heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from natsl.model import LMOutput
from natsl.tasks.sequences import IGNORED, Batch

_BY_SEQUENCE = ("nats", "tokens", "right", "asked", "kept")  # the tensors


@dataclass(frozen=True, eq=False)
class Counts:
    """What was counted in B sequences of one task, on the CPU.

    ``nats`` float64 [B]: summed loss of the ``tokens`` int64 [B] of scored text. ``right`` of the ``asked`` answers,
    int64 [B]. ``kept`` int64 [B,L,R]: complete chunks that softmax kept, of ``chunks`` in every sequence.
    ``in_bytes``: a token of text is a byte.
    """

    nats: Tensor
    tokens: Tensor
    right: Tensor
    asked: Tensor
    kept: Tensor
    chunks: int
    in_bytes: bool = True

    def __len__(self) -> int:
        return self.nats.shape[0]

    @classmethod
    def of(cls, batch: Batch, output: LMOutput, chunk_size: int) -> Counts:
        """The counts of one batch from what the model gave for its tokens and targets."""
        assert output.loss is not None, "the model was given targets"
        assert output.right is not None, "the model was given targets"
        chunks = batch.tokens.shape[1] // chunk_size
        text = (batch.targets != IGNORED) & ~batch.recall
        kept = torch.stack([layer.route[:, :chunks].sum(1) for layer in output.layers], 1)  # [B,L,R]
        return cls(
            nats=output.loss.double().where(text, 0.0).sum(1).cpu(),
            tokens=text.sum(1).cpu(),
            right=(output.right & batch.recall).sum(1).cpu(),
            asked=batch.recall.sum(1).cpu(),
            kept=kept.long().cpu(),
            chunks=chunks,
            in_bytes=batch.in_bytes,
        )

    def rows(self, index: slice) -> Counts:
        """Some of the sequences."""
        part = {name: getattr(self, name)[index] for name in _BY_SEQUENCE}
        return Counts(**part, chunks=self.chunks, in_bytes=self.in_bytes)

    @classmethod
    def cat(cls, parts: Sequence[Counts]) -> Counts:
        """The sequences of all parts, which have one length, in order."""
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in _BY_SEQUENCE}
        return cls(**joined, chunks=parts[0].chunks, in_bytes=parts[0].in_bytes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        by_sequence = {name: getattr(self, name).tolist() for name in _BY_SEQUENCE}
        return by_sequence | {"chunks": self.chunks, "in_bytes": self.in_bytes}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Counts:
        """The inverse of ``to_dict``, also after JSON."""
        return cls(
            nats=torch.tensor(plain["nats"], dtype=torch.float64),
            **{name: torch.tensor(plain[name]) for name in ("tokens", "right", "asked", "kept")},
            chunks=plain["chunks"],
            in_bytes=plain.get("in_bytes", True),  # older counts do not have it
        )
