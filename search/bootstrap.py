"""Objectives of policies on resampled test sequences, the same ones for all policies: how sure a difference is.

Shapes: D draws, P policies, B sequences of a task, L layers, R routing heads.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from natsl.counts import Counts
from natsl.evaluate import Evaluation
from natsl.search.objective import measure
from natsl.search.pareto import Values
from natsl.search.study import Problem
from natsl.space.policy import Op, RoutingPolicy
from natsl.tasks import metrics

DRAWS = 200
_BLOCK = 25  # draws whose kept fractions are in memory at once

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Means:
    """What an evaluation is made of, under every draw and policy; ``nan`` where nothing is scored.

    ``loss`` [D,P], ``errors`` task → [D,P], ``kept`` [D,P,L,R] as fractions. ``in_bytes``: a token of text is a byte.
    """

    loss: Array
    errors: Mapping[str, Array]
    kept: Array
    in_bytes: bool = True


def resampled(
    tested: Sequence[tuple[RoutingPolicy, Mapping[str, Counts]]], problem: Problem, seed: int, draws: int = DRAWS
) -> list[list[Values]]:
    """The objectives of every policy in every draw, [D][P]; sequences are drawn with replacement within each task.

    ``tested``: policies with what was counted in the same sequences. Draws in which an objective is missing, which
    needs few sequences that ask for anything, are left out. Empty if no task has two sequences: nothing varies.
    """
    if not tested or all(len(counts) < 2 for counts in tested[0][1].values()):
        return []
    rng = np.random.default_rng(seed)
    sizes = {task: len(first) for task, first in tested[0][1].items()}
    weights = {task: rng.multinomial(n, np.full(n, 1 / n), size=draws) for task, n in sizes.items()}  # [D,B]
    names = [item.name for item in problem.objectives]
    results: list[list[Values]] = []
    for start in range(0, draws, _BLOCK):
        block = {task: drawn[start : start + _BLOCK] for task, drawn in weights.items()}
        means = _means([counts for _, counts in tested], block)
        for draw in range(len(means.loss)):
            with contextlib.suppress(FloatingPointError):
                results.append(
                    [
                        measure(names, _evaluation(means, problem.kinds, draw, place), policy, problem.costs)
                        for place, (policy, _) in enumerate(tested)
                    ]
                )
    return results


def standard_error(values: Sequence[float]) -> float | None:
    """The standard deviation over draws (None: there are none)."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _means(tested: Sequence[Mapping[str, Counts]], drawn: Mapping[str, npt.NDArray[np.int64]]) -> _Means:
    """``drawn``: task → how often each sequence was drawn, [D,B]."""
    layers, heads = next(iter(tested[0].values())).kept.shape[1:]
    shape = (len(next(iter(drawn.values()))), len(tested))
    nats, tokens, kept, chunks = np.zeros(shape), np.zeros(shape), np.zeros((*shape, layers, heads)), 0
    errors: dict[str, Array] = {}
    for task, first in tested[0].items():
        n = len(first)
        weights = drawn[task].astype(np.float64)
        sums = {
            name: weights @ np.stack([getattr(counts[task], name).double().numpy() for counts in tested], 1)
            for name in ("nats", "tokens", "right", "asked")
        }
        each = np.stack([counts[task].kept.double().flatten(1).numpy() for counts in tested], 1)  # [B,P,L·R]
        kept += (weights @ each.reshape(n, -1)).reshape(kept.shape)
        nats, tokens, chunks = nats + sums["nats"], tokens + sums["tokens"], chunks + n * first.chunks
        with np.errstate(invalid="ignore"):
            errors[task] = 1 - sums["right"] / sums["asked"]
    with np.errstate(invalid="ignore"):
        in_bytes = all(counts.in_bytes for counts in tested[0].values())
        return _Means(nats / tokens, errors, kept / max(chunks, 1), in_bytes)


def _evaluation(means: _Means, kinds: Sequence[Op], draw: int, place: int) -> Evaluation:
    """What ``summary`` gives, without the fractions of each task."""
    loss = _known(means.loss[draw, place])
    errors = {task: _known(values[draw, place]) for task, values in means.errors.items()}
    by_head = means.kept[draw, place]  # [L,R]
    by_layer = by_head.mean(1)
    routed = [i for i, kind in enumerate(kinds) if kind is Op.routed]
    return Evaluation(
        val_loss=loss,
        bits_per_byte=loss / math.log(2) if loss is not None and means.in_bytes else None,
        errors={metric: errors.get(task) for task, metric in metrics().items()},
        kept_fraction=float(by_layer[routed].mean()) if routed else 0.0,
        kept_by_layer=tuple(by_layer.tolist()),
        kept_by_head=tuple(map(tuple, by_head.tolist())),
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
