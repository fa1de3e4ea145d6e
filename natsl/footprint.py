"""Bytes of a cache by length: measured on real sequences, by the cost model, and those of dense attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from natsl.model import RoutedLM
from natsl.space import cost
from natsl.space.policy import RoutingPolicy


@dataclass(frozen=True)
class Footprint:
    """Bytes of the cache of one sequence after ``tokens`` tokens, a mean over sequences.

    ``used``: of its tensors without free pages and places for them; ``held``: with those that it has in reserve.
    ``predicted``: what ``cost.cache_bytes`` says of the fractions ``kept`` in each layer. ``read``: keys and values
    that a decoded token reads, by ``cost.kv_bytes``, which searches count. ``dense``: keys and values of dense
    attention in every layer with the same heads and widths.
    """

    tokens: int
    used: float
    held: float
    predicted: float
    read: float
    dense: float
    kept: tuple[float, ...]

    @property
    def difference(self) -> float:
        """How far the cost model is off, relative to what was measured."""
        return self.predicted / self.used - 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {**vars(self), "difference": self.difference}


def footprints(model: RoutedLM, policy: RoutingPolicy, sequences: Tensor, lengths: Sequence[int]) -> list[Footprint]:
    """The bytes at ascending ``lengths`` ≤ T of reading ``sequences`` int64 [S,T], each into a cache of its own.

    Counted in the dtype that the model computes in.
    """
    shapes, size = model.config.layer_shapes(), model.dtype.itemsize
    used, held = (torch.zeros(len(lengths), dtype=torch.float64) for _ in range(2))
    kept = torch.zeros(len(lengths), len(shapes), dtype=torch.float64)
    model.eval()
    for row in sequences.to(model.embed.weight.device):
        cache, start = model.new_cache(1), 0
        for i, tokens in enumerate(lengths):
            model(row[None, start:tokens], policy, cache=cache, logits_to_keep=1)
            start = tokens
            held[i] += cache.nbytes
            copy = cache.select([0])  # without free pages
            used[i] += copy.nbytes
            for layer, state in enumerate(copy.layers):
                if state.pages is not None:
                    table, own = state.pages.table, state.pages.kept
                    used[i] -= table.element_size() * (table.numel() - int((own + 1).sum()))  # free places for pages
                    kept[i, layer] += own.double().mean().cpu()
    found = []
    for i, tokens in enumerate(lengths):
        chunks = max(1, tokens // policy.chunk_size)
        fractions = (kept[i] / len(sequences) / chunks).tolist()
        found.append(
            Footprint(
                tokens,
                used=float(used[i]) / len(sequences),
                held=float(held[i]) / len(sequences),
                predicted=cost.cache_bytes(shapes, policy, fractions, tokens, size),
                read=cost.kv_bytes(shapes, policy, fractions, tokens, size),
                dense=float(sum(tokens * cost.kv_token_bytes(shape, size) for shape in shapes)),
                kept=tuple(fractions),
            )
        )
    return found
