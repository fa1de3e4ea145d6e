"""Successive halving: a policy is judged on a part of the held-out sequences first, and on all if that is worth it.

Optuna prunes no trials of several objectives; this does, by non-dominated rank. Counts of the parts add up, so that a
policy that goes on is judged on each sequence once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import moocore
import numpy as np

from natsl.counts import Counts
from natsl.evaluate import Evaluation, count, count_each, summary
from natsl.model import RoutedLM
from natsl.space.policy import RoutingPolicy
from natsl.tasks.sequences import Batch

KEEP = 0.25  # share of the policies judged on a part that go on, by rank
FEWEST = 8  # policies that must have been judged on a part before one is stopped

_REMEMBERED = 16  # policies whose counts on the first parts wait for the next one

Result: TypeAlias = tuple[float, ...]  # objectives, then by how much constraints are broken; smaller is better


def goes_on(own: Result, same: Sequence[Result], complete: Sequence[Result]) -> bool:
    """Whether a policy with the result ``own`` on a part of the sequences is judged on the next part.

    ``same``: results of other policies on that part; it has to be in the best ``KEEP`` of them by non-dominated rank.
    ``complete``: results on all sequences; whatever none of these covers goes on too, so that the ends of the front,
    where many results on a part are equal, stay open.
    """
    if len(same) < FEWEST or not any(_covers(other, own) for other in complete):
        return True
    ranks = moocore.pareto_rank(np.array([own, *same]))
    return int((ranks < ranks[0]).sum()) < KEEP * len(ranks)


def _covers(first: Result, second: Result) -> bool:
    return all(a <= b for a, b in zip(first, second, strict=True))


def useful(shares: Sequence[float], sequences: int) -> list[float]:
    """Those of the shares that add a sequence, where a task has so many."""
    ends = {_end(share, sequences): share for share in reversed(shares)}  # the least of equal ones
    return [*(share for end, share in sorted(ends.items()) if end < sequences), 1.0]


def _end(share: float, size: int) -> int:
    return max(1, math.ceil(share * size))


class Parts:
    """Judges policies on growing parts of sequences: ``shares`` of those of every task, the last one all of them."""

    def __init__(self, model: RoutedLM, sets: Mapping[str, Batch], shares: Sequence[float], batch_size: int) -> None:
        self._model = model
        self._batch_size = batch_size
        self._shares = shares
        self._parts = [
            {task: part for task, batch in sets.items() if len(part := batch.rows(_rows(len(batch), shares, rung)))}
            for rung in range(len(shares))
        ]
        self._known: dict[RoutingPolicy, list[dict[str, Counts]]] = {}  # of the latest policies, by part

    def judge(self, policy: RoutingPolicy, share: float = 1.0) -> Evaluation:
        """Score a policy on one of the shares of the sequences; ``FloatingPointError`` if a result is not finite."""
        counts, parts = self._known.pop(policy, []), self._shares.index(share) + 1
        self._known[policy] = counts
        if len(self._known) > _REMEMBERED:
            del self._known[next(iter(self._known))]
        for part in self._parts[len(counts) : parts]:
            counts.append(count(self._model, policy, part, batch_size=self._batch_size))
        return self._sum(counts[:parts])

    def judge_each(self, policies: Sequence[RoutingPolicy], trials: bool = True) -> list[dict[float, Evaluation]]:
        """Score distinct policies on every share, several in a pass (nothing of one whose results are not finite).

        The same whether they are ``trials`` or not.
        """
        parts = [count_each(self._model, policies, part, batch_size=self._batch_size) for part in self._parts]
        results: list[dict[float, Evaluation]] = []
        for of_policy in zip(*parts, strict=True):
            counts = [part for part in of_policy if part is not None]
            shares = self._shares if len(counts) == len(of_policy) else ()
            results.append({share: self._sum(counts[: i + 1]) for i, share in enumerate(shares)})
        return results

    def _sum(self, counts: Sequence[Mapping[str, Counts]]) -> Evaluation:
        joined = {task: Counts.cat([part[task] for part in counts if task in part]) for task in counts[0]}
        return summary(joined, self._model.kinds)


def _rows(size: int, shares: Sequence[float], rung: int) -> slice:
    """The sequences that a rung adds, at least one of them at the first."""
    ends = [0, *(_end(share, size) for share in shares)]
    return slice(ends[rung], ends[rung + 1])
