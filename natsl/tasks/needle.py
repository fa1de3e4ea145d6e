"""Needles in real text: keys and values planted at a depth, asked for at the end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from natsl.space.check import check, check_counts
from natsl.tasks.task import Request, Task

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from natsl.tasks.sequences import Batch


@dataclass
class NeedleConfig:
    """Keys planted in real text at a depth, asked for at the end.

    ``depth_min``/``depth_max``: where needles may lie, as fractions of the text before the question.
    """

    needles: int = 1
    depth_min: float = 0.0
    depth_max: float = 1.0

    def __post_init__(self) -> None:
        check_counts(1, {"data.needle.needles": self.needles})
        check(
            0 <= self.depth_min <= self.depth_max <= 1,
            "data.needle.depth_min/depth_max",
            (self.depth_min, self.depth_max),
            "0 ≤ depth_min ≤ depth_max ≤ 1",
        )


class NeedleTask(Task[NeedleConfig]):
    """Needles, each a key and its value, planted in contiguous text; their keys are asked for at the very end.

    The depth of a needle is the share of the text's bytes that come before it.
    """

    name = "needle"
    metric = "needle_error"
    needs_pairs = True
    has_depth = True

    def check(self, length: int) -> None:
        """There are enough keys and some text is left around the needles."""
        needles = self.config.needles
        check(needles <= self.keys, "data.needle.needles", needles, f"there are {self.keys} keys (data.keys)")
        name = "data.seq_len" if length == self.seq_len else "length"
        check(length > 3 * needles, name, length, f"needle needs more than 3 tokens for each of {needles} needles")

    def make(self, text: Tensor, request: Request, generator: torch.Generator) -> Batch:
        """Text with the needles inserted, then the keys in another order."""
        import torch

        from natsl.tasks.sequences import append_questions, draw_pairs, interleave, shuffles

        count, needles = request.count, self.config.needles
        size = request.length - 3 * needles  # bytes of text
        keys, values = draw_pairs(count, needles, self.keys, generator)
        query = shuffles(count, needles, generator)
        low, high = self.config.depth_min, self.config.depth_max
        if request.depth is not None:
            low = high = request.depth
        # Whole bytes within the range; the tolerance forgives 0.07 · 100 = 7.000000000000001.
        first, last = math.ceil(low * size - 1e-9), math.floor(high * size + 1e-9)
        if first > last:  # the range is between two bytes
            first = last = round(low * size)
        before = torch.randint(first, last + 1, (count, needles), generator=generator).sort(dim=1).values
        start = before + 2 * torch.arange(needles)  # earlier needles take two tokens each
        body_length = request.length - needles
        is_pair = torch.zeros(count, body_length, dtype=torch.bool)
        is_pair.scatter_(1, start, True).scatter_(1, start + 1, True)
        body = interleave(text, is_pair, torch.stack((keys, values), dim=-1).flatten(1), generator)
        return append_questions(body, is_pair, keys.gather(1, query), values.gather(1, query))
