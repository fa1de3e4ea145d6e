"""Multi-query associative recall inside real text."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from natsl.space.check import check, check_counts
from natsl.tasks.task import Request, Task

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from natsl.tasks.sequences import Batch


@dataclass
class MqarConfig:
    """Multi-query associative recall inside real text.

    A sequence is cut into segments of ``segment`` tokens. The share ``pair_share`` of them, at random places, holds
    ``segment / 2`` key–value pairs, the others hold text; the last ``query_segments`` ask for keys, each answered by
    its value. ``shift``: whether the cut before the questions begins at a random token of each sequence, less than a
    segment from its start, so that segments lie across the borders of chunks.
    """

    segment: int = 16
    pair_share: float = 0.25
    query_segments: int = 2
    easy_share: float = 0.0
    easy_pairs: list[int] = field(default_factory=lambda: [4, 8, 16])
    shift: bool = True

    def __post_init__(self) -> None:
        check_counts(2, {"data.mqar.segment": self.segment})
        check(self.segment % 2 == 0, "data.mqar.segment", self.segment, "it must be even and ≥ 2")
        check(0 < self.pair_share < 1, "data.mqar.pair_share", self.pair_share, "it must lie in (0, 1)")
        check_counts(1, {"data.mqar.query_segments": self.query_segments})
        check(type(self.shift) is bool, "data.mqar.shift", self.shift, "it must be true or false")
        check(0 <= self.easy_share <= 1, "data.mqar.easy_share", self.easy_share, "it must lie in [0, 1]")
        check(
            all(type(n) is int and n >= 1 for n in self.easy_pairs) and (self.easy_share == 0 or bool(self.easy_pairs)),
            "data.mqar.easy_pairs",
            self.easy_pairs,
            "counts ≥ 1, at least one if easy_share > 0",
        )


class MqarTask(Task[MqarConfig]):
    """Segments of pairs between contiguous text, then segments of queried keys.

    The keys of a sequence are distinct and so are its queries, while there are enough pairs. The number of pairs
    follows from ``data.seq_len``, also in sequences of another length: these hold more or less text around them, unless
    pairs are asked to grow with the length. Easy training batches repeat a few pairs.
    """

    name = "mqar"
    metric = "recall_error"
    needs_pairs = True

    def check(self, length: int) -> None:
        """The length is a multiple of a segment with room for text, and there are enough keys."""
        segment, share = self.config.segment, self.config.pair_share
        for name, value in (("data.seq_len", self.seq_len), ("length", length)):
            check(value % segment == 0, name, value, f"mqar needs a multiple of data.mqar.segment = {segment}")
        pairs, pair_segments = self._pairs(self.seq_len)
        check(
            pairs <= self.keys,
            "data.mqar.pair_share",
            share,
            f"it asks for {pairs} distinct pairs in data.seq_len = {self.seq_len}, there are {self.keys} keys "
            "(data.keys)",
        )
        fewest = (pair_segments + self.config.query_segments + 1) * segment
        name = "data.seq_len" if length == self.seq_len else "length"
        check(length >= fewest, name, length, f"mqar needs at least {fewest}: pairs, queries and a segment of text")

    def planted(self, length: int) -> tuple[int, int]:
        """Pairs of sequences that grow with the length: as many as there are keys for, and as the share asks for."""
        pairs, segments = self._pairs(length)
        per_segment = self.config.segment // 2
        return min(segments, self.keys // per_segment) * per_segment, pairs

    def make(self, text: Tensor, request: Request, generator: torch.Generator) -> Batch:
        """Sequences laid out segment by segment."""
        import torch

        from natsl.tasks.sequences import append_questions, draw_pairs, draw_uniform, interleave, shuffles

        count, segment = request.count, self.config.segment
        pairs = self.planted(request.length)[0] if request.grow else self._pairs(self.seq_len)[0]
        pair_segments = pairs // (segment // 2)
        queries = self.config.query_segments * segment
        context = request.length - queries  # tokens before the queries
        distinct = pairs
        if request.training and draw_uniform(generator) < self.config.easy_share:
            choice = int(draw_uniform(generator) * len(self.config.easy_pairs))
            distinct = min(self.config.easy_pairs[choice], pairs)

        cells = context // segment - int(self.config.shift)  # shifted, a segment is cut in two at the ends
        place = shuffles(count, cells, generator)[:, :pair_segments]
        holds_pairs = torch.zeros(count, cells, dtype=torch.bool).scatter_(1, place, True)
        is_pair = holds_pairs.repeat_interleave(segment, dim=1)  # [B, context]
        if self.config.shift:
            start = torch.randint(segment, (count, 1), generator=generator)
            shifted = torch.arange(context) - start  # [B, context], the token's place in the grid
            inside = (shifted >= 0) & (shifted < is_pair.shape[1])
            is_pair = is_pair.gather(1, shifted.clamp(0, is_pair.shape[1] - 1)) & inside

        keys, values = draw_pairs(count, distinct, self.keys, generator)
        which = shuffles(count, pairs, generator) % distinct  # equals a permutation unless the batch is easy
        keys, values = keys.gather(1, which), values.gather(1, which)  # [B, pairs], in order of appearance
        query = shuffles(count, pairs, generator)[:, torch.arange(queries) % pairs]  # [B, queries]
        body = interleave(text, is_pair, torch.stack((keys, values), dim=-1).flatten(1), generator)
        return append_questions(body, is_pair, keys.gather(1, query), values.gather(1, query))

    def places(self, batch: Batch) -> Tensor:
        """Of a key that was planted several times, the first place."""
        row, at = batch.recall.nonzero(as_tuple=True)
        body = batch.tokens.masked_fill(batch.recall, -1)
        planted = (body[row] == batch.tokens[row, at, None]).int().argmax(1)
        return batch.tokens.new_full(batch.tokens.shape, -1).index_put((row, at), planted)

    def _pairs(self, length: int) -> tuple[int, int]:
        """Pairs that the share asks for in a sequence of this length and the segments that hold them."""
        segments = max(1, math.floor(self.config.pair_share * (length // self.config.segment) + 0.5))
        return segments * self.config.segment // 2, segments
