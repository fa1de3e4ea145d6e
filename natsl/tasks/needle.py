"""Needles in real text: keys and values planted at a depth, asked for at the end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from natsl.space.check import check, check_choice, check_counts
from natsl.tasks.task import Request, Task

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from natsl.tasks.sequences import Batch


MARK, EQUALS = ord("@"), ord("=")
LETTERS, DIGITS = range(ord("a"), ord("z") + 1), range(ord("0"), ord("9") + 1)


class Alphabet(Enum):
    """What needles are written in."""

    tokens = "tokens"  # a key and a value, tokens that never occur in text
    bytes = "bytes"  # such as @=kq7: a mark, two letters and a digit, asked for by @=kq


@dataclass
class NeedleConfig:
    """Keys planted in real text at a depth, asked for at the end.

    ``depth_min``/``depth_max``: where needles may lie, as fractions of the text before the question. ``alphabet``:
    ``tokens`` of their own, or ordinary ``bytes``, such as ``@=kq7``, asked for by ``@=kq``; they have ``data.keys``
    different keys, 676 at most.
    """

    needles: int = 1
    depth_min: float = 0.0
    depth_max: float = 1.0
    alphabet: Alphabet = Alphabet.tokens

    def __post_init__(self) -> None:
        check_counts(1, {"data.needle.needles": self.needles})
        check(
            0 <= self.depth_min <= self.depth_max <= 1,
            "data.needle.depth_min/depth_max",
            (self.depth_min, self.depth_max),
            "0 ≤ depth_min ≤ depth_max ≤ 1",
        )
        self.alphabet = check_choice("data.needle.alphabet", self.alphabet, Alphabet)


class NeedleTask(Task[NeedleConfig]):
    """Needles, each a key and its value, planted in contiguous text; their keys are asked for at the very end.

    The depth of a needle is the share of the text's bytes that come before it. Written in bytes, a question looks like
    a needle without its value; where the text itself has one, its first byte becomes a space.
    """

    name = "needle"
    metric = "needle_error"
    needs_pairs = True
    has_depth = True

    def uses_pairs(self) -> bool:
        """Whether needles are key and value tokens."""
        return self.config.alphabet is Alphabet.tokens

    def check(self, length: int) -> None:
        """There are enough keys and some text is left around the needles."""
        needles, keys = self.config.needles, self.keys
        most = len(LETTERS) ** 2
        check(self.uses_pairs() or keys <= most, "data.keys", keys, f"needles of two letters have {most} keys")
        check(needles <= keys, "data.needle.needles", needles, f"there are {keys} keys (data.keys)")
        name, each = "data.seq_len" if length == self.seq_len else "length", sum(self._sizes)
        check(
            length > each * needles, name, length, f"needle needs more than {each} tokens for each of {needles} needles"
        )

    def planted(self, length: int) -> tuple[int, int]:
        """Needles of sequences that grow with the length: as many as there are keys for, and as many in proportion."""
        wanted = max(1, self.config.needles * length // self.seq_len)
        return min(wanted, self.keys), wanted

    def make(self, text: Tensor, request: Request, generator: torch.Generator) -> Batch:
        """Text with the needles inserted, then the keys in another order."""
        import torch

        from natsl.tasks.sequences import append_questions, draw_pairs, interleave, shuffles

        count = request.count
        needles = self.planted(request.length)[0] if request.grow else self.config.needles
        width, asked = self._sizes
        size = request.length - (width + asked) * needles  # bytes of text
        in_bytes = not self.uses_pairs()
        keys, values = (_draw_bytes if in_bytes else draw_pairs)(count, needles, self.keys, generator)
        query = shuffles(count, needles, generator)
        low, high = self.config.depth_min, self.config.depth_max
        if request.depth is not None:
            low = high = request.depth
        # Whole bytes within the range; the tolerance forgives 0.07 · 100 = 7.000000000000001.
        first, last = math.ceil(low * size - 1e-9), math.floor(high * size + 1e-9)
        if first > last:  # the range is between two bytes
            first = last = round(low * size)
        before = torch.randint(first, last + 1, (count, needles), generator=generator).sort(dim=1).values
        start = before + width * torch.arange(needles)  # earlier needles take their tokens
        is_pair = torch.zeros(count, size + width * needles, dtype=torch.bool)
        for token in range(width):
            is_pair.scatter_(1, start + token, True)
        if in_bytes:
            written = torch.cat((keys, values[..., None]), dim=2)  # [B, needles, width]
            body = _without_questions(interleave(text, is_pair, written.flatten(1), generator), is_pair)
            return _append_questions(body, is_pair, keys.take_along_dim(query[..., None], 1), values.gather(1, query))
        body = interleave(text, is_pair, torch.stack((keys, values), dim=-1).flatten(1), generator)
        return append_questions(body, is_pair, keys.gather(1, query), values.gather(1, query))

    @property
    def _sizes(self) -> tuple[int, int]:
        """Tokens of a needle and of the question for it."""
        return (2, 1) if self.uses_pairs() else (5, 4)


def _draw_bytes(count: int, needles: int, choice: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Distinct questions such as ``@=kq``, out of ``choice`` many, int64 [count, needles, 4], and any digits."""
    import torch

    from natsl.tasks.sequences import shuffles

    number = shuffles(count, choice, generator)[:, :needles]
    letters = math.isqrt(choice - 1) + 1  # so many first letters, and as many second ones
    first, second = LETTERS.start + number // letters, LETTERS.start + number % letters
    mark, equals = torch.full_like(number, MARK), torch.full_like(number, EQUALS)
    values = torch.randint(DIGITS.start, DIGITS.stop, (count, needles), generator=generator)
    return torch.stack((mark, equals, first, second), dim=2), values


def _without_questions(body: Tensor, is_pair: Tensor) -> Tensor:
    """The body [B, S] with a space for the first byte wherever the text itself holds what looks like a question."""
    third, fourth = body[:, 2:-1], body[:, 3:]
    letters = (third >= LETTERS.start) & (third < LETTERS.stop) & (fourth >= LETTERS.start) & (fourth < LETTERS.stop)
    looks = (body[:, :-3] == MARK) & (body[:, 1:-2] == EQUALS) & letters & ~is_pair[:, :-3]
    body[:, :-3][looks] = ord(" ")
    return body


def _append_questions(body: Tensor, is_pair: Tensor, questions: Tensor, values: Tensor) -> Batch:
    """Append questions [B, Q, 4] in bytes; score the text's next bytes, and at the end of each its value [B, Q].

    Every needle is asked for, so that all of them are relevant.
    """
    import torch

    from natsl.tasks.sequences import IGNORED, Batch, text_targets

    asked = torch.full(questions.shape, IGNORED)
    asked[..., -1] = values
    targets = torch.cat((text_targets(body, is_pair), asked.flatten(1)), dim=1)
    tokens = torch.cat((body, questions.flatten(1)), dim=1)
    recall = torch.zeros_like(tokens, dtype=torch.bool)
    recall[:, body.shape[1] :] = (asked != IGNORED).flatten(1)
    relevant = torch.zeros_like(recall)
    relevant[:, : body.shape[1]] = is_pair
    return Batch(tokens, targets, recall, relevant)
