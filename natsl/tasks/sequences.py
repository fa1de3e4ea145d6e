"""Sequences of tokens: the vocabulary, batches, and the parts that tasks make them of.

Shapes: B sequences, T tokens. Vocabulary: 256 bytes, then 64 keys, then 64 values, then the keys that ``data.keys`` has
beyond 64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BYTES = range(256)
KEYS = range(256, 320)
VALUES = range(320, 384)
IGNORED = -100  # target of a position that is not scored


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences and what is scored in them.

    ``tokens`` int64 [B, T]; ``targets`` int64 [B, T], the token to predict at each position (already shifted) or
    -100 where nothing is scored; ``recall`` bool [B, T], true where the target has to be recalled from earlier in the
    sequence, such as the value of a queried key (the other scored targets are next bytes of the text).
    """

    tokens: Tensor
    targets: Tensor
    recall: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device; a GPU copies it while the host goes on."""
        target = torch.device(device)

        def move(x: Tensor) -> Tensor:
            pin = target.type == "cuda" and x.device.type == "cpu"
            return (x.pin_memory() if pin else x).to(target, non_blocking=pin)

        return Batch(move(self.tokens), move(self.targets), move(self.recall))

    def rows(self, index: slice | Tensor) -> Batch:
        """Some of the sequences."""
        return Batch(self.tokens[index], self.targets[index], self.recall[index])


def draw_uniform(generator: torch.Generator) -> float:
    """A number in [0, 1)."""
    return torch.rand((), generator=generator, dtype=torch.float64).item()


def shuffles(count: int, size: int, generator: torch.Generator) -> Tensor:
    """One random permutation of 0 … size - 1 per row, int64 [count, size]."""
    return torch.rand(count, size, generator=generator, dtype=torch.float64).argsort(dim=1)


def draw_windows(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Contiguous stretches of text at random places, int64 [count, length]."""
    starts = torch.randint(text.numel() - length + 1, (count, 1), generator=generator)
    return text[starts + torch.arange(length)].long()


def draw_pairs(count: int, pairs: int, choice: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Distinct keys, out of ``choice`` many, and any values per row, each int64 [count, pairs]."""
    keys = KEYS.start + shuffles(count, choice, generator)[:, :pairs]
    keys = torch.where(keys < KEYS.stop, keys, keys + len(VALUES))
    values = torch.randint(VALUES.start, VALUES.stop, (count, pairs), generator=generator)
    return keys, values


def interleave(text: Tensor, is_pair: Tensor, pairs: Tensor, generator: torch.Generator) -> Tensor:
    """Contiguous text with ``pairs`` [B, 2·pairs] inserted where ``is_pair`` [B, S]; int64 [B, S].

    Every row holds the same number of pair tokens, so that filling the mask in row-major order keeps rows apart.
    """
    count, size = is_pair.shape
    body = torch.empty(count, size, dtype=torch.int64)
    body[is_pair] = pairs.flatten()
    body[~is_pair] = draw_windows(text, count, size - pairs.shape[1], generator).flatten()
    return body


def append_questions(body: Tensor, is_pair: Tensor, keys: Tensor, values: Tensor) -> Batch:
    """Append the queried keys; score next bytes inside stretches of text, and at each query its value.

    ``body`` and ``is_pair`` [B, S], ``keys`` and ``values`` [B, Q]; the batch has T = S + Q.
    """
    targets = torch.full_like(body, IGNORED)
    inside = ~(is_pair[:, :-1] | is_pair[:, 1:])  # a byte whose next token is the next byte of the text
    targets[:, :-1] = torch.where(inside, body[:, 1:], IGNORED)
    recall = torch.zeros(body.shape[0], body.shape[1] + keys.shape[1], dtype=torch.bool)
    recall[:, body.shape[1] :] = True
    return Batch(torch.cat((body, keys), dim=1), torch.cat((targets, values), dim=1), recall)
