"""Sequences of tokens: the vocabulary, batches, and the parts that tasks make them of.

Shapes: B sequences, T tokens. Vocabulary: 256 bytes, then 64 keys, then 64 values, then the keys that ``data.keys`` has
beyond 64, then the ids of a tokenizer from 256 on; its ids below 256 take the places of bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from natsl.space.check import check_counts

BYTES = range(256)
KEYS = range(256, 320)
VALUES = range(320, 384)
IGNORED = -100  # target of a position that is not scored


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences and what is scored in them.

    ``tokens`` int64 [B, T]; ``targets`` int64 [B, T], the token to predict at each position (already shifted) or
    -100 where nothing is scored; ``recall`` bool [B, T], true where the target has to be recalled from earlier in the
    sequence, such as the value of a queried key (the other scored targets are next bytes of the text); ``relevant``
    bool [B, T], true on the tokens that the answers are to be found in, such as a queried key and its value (by default
    nowhere: the task does not say). No model sees it: it is what an ideal router would keep. ``in_bytes``: the text is
    bytes, not ids of a tokenizer.
    """

    tokens: Tensor
    targets: Tensor
    recall: Tensor
    relevant: Tensor = None  # type: ignore[assignment]  # a default that needs the shape
    in_bytes: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if self.relevant is None:
            object.__setattr__(self, "relevant", torch.zeros_like(self.recall))

    @staticmethod
    def cat(batches: Iterable[Batch]) -> Batch:
        """The sequences of all batches, which have one length, in order."""
        first, *others = batches
        return first._with(map(torch.cat, zip(*(batch._tensors() for batch in (first, *others)), strict=True)))

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device; a GPU copies it while the host goes on."""
        target = torch.device(device)

        def move(x: Tensor) -> Tensor:
            pin = target.type == "cuda" and x.device.type == "cpu"
            return (x.pin_memory() if pin else x).to(target, non_blocking=pin)

        return self._with(map(move, self._tensors()))

    def rows(self, index: slice | Tensor) -> Batch:
        """Some of the sequences."""
        return self._with(x[index] for x in self._tensors())

    def relevant_chunks(self, chunk_size: int) -> Tensor:
        """The chunks with a relevant token, bool [B, ceil(T / chunk_size)]; the last one may be incomplete."""
        check_counts(1, {"chunk_size": chunk_size})
        padded = F.pad(self.relevant, (0, -self.relevant.shape[1] % chunk_size))
        return padded.view(len(self), -1, chunk_size).any(dim=2)

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.tokens, self.targets, self.recall, self.relevant

    def _with(self, tensors: Iterable[Tensor]) -> Batch:
        return Batch(*tensors, in_bytes=self.in_bytes)


def draw_uniform(generator: torch.Generator) -> float:
    """A number in [0, 1)."""
    return torch.rand((), generator=generator, dtype=torch.float64).item()


def shuffles(count: int, size: int, generator: torch.Generator) -> Tensor:
    """One random permutation of 0 … size - 1 per row, int64 [count, size]."""
    return torch.rand(count, size, generator=generator, dtype=torch.float64).argsort(dim=1)


def move_ids(ids: Tensor, keys: int) -> Tensor:
    """Ids of a tokenizer [tokens] with those from 256 on moved behind the ``keys`` keys and the values of tasks.

    In int16 or int32, whichever is smaller and holds them; ids that are all below 256 stay as they are.
    """
    largest = int(ids.max())
    if largest < BYTES.stop:
        return ids
    offset = VALUES.stop + max(0, keys - len(KEYS)) - BYTES.stop
    ids = ids.to(torch.int16 if largest + offset < 2**15 else torch.int32)
    return torch.where(ids < BYTES.stop, ids, ids + offset)


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


def text_targets(body: Tensor, is_pair: Tensor) -> Tensor:
    """Targets [B, S] of a body: next bytes inside stretches of text, nothing at pairs, before them and at the end."""
    targets = torch.full_like(body, IGNORED)
    inside = ~(is_pair[:, :-1] | is_pair[:, 1:])  # a byte whose next token is the next byte of the text
    targets[:, :-1] = torch.where(inside, body[:, 1:], IGNORED)
    return targets


def append_questions(body: Tensor, is_pair: Tensor, keys: Tensor, values: Tensor) -> Batch:
    """Append the queried keys; score next bytes inside stretches of text, and at each query its value.

    ``body`` and ``is_pair`` [B, S], ``keys`` and ``values`` [B, Q]; the batch has T = S + Q. Every occurrence of a
    queried key in the body and the value after it are relevant.
    """
    targets = text_targets(body, is_pair)
    recall = torch.zeros(body.shape[0], body.shape[1] + keys.shape[1], dtype=torch.bool)
    recall[:, body.shape[1] :] = True
    tokens = torch.cat((body, keys), dim=1)
    asked = torch.zeros(len(body), int(tokens.max()) + 1, dtype=torch.bool).scatter_(1, keys, True)  # by token
    is_key = asked.gather(1, body)  # text and values share no token with keys
    relevant = torch.zeros_like(recall)
    relevant[:, : body.shape[1]] = is_key
    relevant[:, 1 : body.shape[1]] |= is_key[:, :-1]  # the value
    return Batch(tokens, torch.cat((targets, values), dim=1), recall, relevant)
