"""One number at a time, then moves along the front that a small model expects most of.

In most models few layers or heads matter. A sweep finds them, and the front of the sweep is where the rest begins. A
move starts from the front, or from what breaks the constraints least where nothing keeps them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial

from natsl.search.samplers.history import Array, History, history_of, span_of
from natsl.search.samplers.model import Model
from natsl.search.samplers.moves import change

_LEVEL = 0.5  # share of its range at which each number is swept, the others at their lowest
_SWEPT = 40  # trials after which no number is swept any more, those included that came first
_START = 10  # trials before the first move
_PARENTS = 8  # where nothing keeps the constraints
# Moves that are compared, in so many rounds, each from the best of the one before; share of the trials that take a move
# as it comes; points that the model knows.
_MOVES, _ROUNDS, _BLIND = 64, 3, 0.25
_POINTS = 100


def make(seed: int) -> BaseSampler:
    """The sampler whose draws come from this seed."""
    return _SweepSampler(seed)


class _SweepSampler(BaseSampler):
    """Makes one trial: a function of the seed and of the results of the study."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._random = RandomSampler(seed)
        self._history = History()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        self._history = history_of(study)
        return dict(self._history.numbers)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        position = _propose(self._history, np.random.default_rng(self._seed))
        return {} if position is None else self._history.params(position)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._random.sample_independent(study, trial, param_name, param_distribution)


def _propose(history: History, random: np.random.Generator) -> Array | None:
    """The next position [d], which was not tried; None: anything."""
    made = len(history.trials)
    if made < _SWEPT and len(history.front):  # where nothing keeps the constraints, a sweep hardly helps
        untried = _new(history, _sweep(history))
        if len(untried):
            choice: Array = untried[random.integers(len(untried))]
            return choice
    if made < _START or not history.valid.any():
        return None
    points, chances = _parents(history)
    moves = _new(history, change(points, chances, _MOVES, random))  # [k, d]
    if not len(moves):
        return None
    if random.random() < _BLIND or np.count_nonzero(history.valid) < _START:
        return np.asarray(moves[0])
    judge = _Judge(history, abs(random.standard_normal()))
    for _ in range(_ROUNDS - 1):
        best = moves[np.argsort(-judge.gain(moves), kind="stable")[:_PARENTS]]
        more = change(best, np.full(len(best), 1 / len(best)), _MOVES, random)
        moves = np.concatenate((best, _new(history, more)))
    return np.asarray(moves[np.argmax(judge.gain(moves))])


def _sweep(history: History) -> Array:
    """Each number at one level and the others at their lowest (on a log scale: in the middle) [·, d]."""
    log = np.array([item.log for item in history.numbers.values()])
    base = np.where(log, 0.5, 0.0)
    return np.asarray(np.where(np.eye(len(log), dtype=bool), _LEVEL, base)[~log])


def _new(history: History, positions: Array) -> Array:
    """Those that were not tried."""
    new: Array = positions[[key not in history.tried for key in history.keys(positions)]]
    return new


def _parents(history: History) -> tuple[Array, Array]:
    """Points [p, d] that moves start from and how often each: half of the time one beside a gap of the front."""
    front = history.front
    if not len(front):
        valid = np.flatnonzero(history.valid)
        least = valid[np.argsort(history.broken[valid], kind="stable")[:_PARENTS]]
        return history.positions[least], np.full(len(least), 1 / len(least))
    values = history.values[front]
    scaled = values / span_of(values)
    gaps = np.full(len(front), 1e-9)
    for column in scaled.T:
        order = np.argsort(column, kind="stable")
        steps = np.abs(np.diff(scaled[order], axis=0)).sum(axis=1)
        gaps[order[:-1]] += steps
        gaps[order[1:]] += steps
    return history.positions[front], 0.5 * gaps / gaps.sum() + 0.5 / len(front)


class _Judge:
    """How much better than the front a position would be, as far as a model knows.

    ``courage``: how many standard deviations better than its mean a result is taken to be. Objectives are compared on a
    logarithmic scale: differences among the worst matter little.
    """

    def __init__(self, history: History, courage: float) -> None:
        valid = history.valid
        values, broken = history.values[valid], history.broken[valid]
        places = np.searchsorted(np.flatnonzero(valid), history.front)
        values = _log(values - values.min(axis=0))
        self._courage, self._count = courage, values.shape[1]
        self._front = values[places]
        self._constrained = bool((broken > 0).any())
        targets = np.column_stack((values, _log(broken[:, None]))) if self._constrained else values
        known = _known(len(values), places)
        self._model = Model(history.positions[valid][known], targets[known])

    def gain(self, positions: Array) -> Array:
        """[k]; less than −1,000 where constraints are expected to be broken."""
        mean, deviation = self._model.predict(positions)
        hoped = mean - self._courage * deviation
        if not len(self._front):
            return -hoped[:, -1]
        ahead = (self._front.T[:, None] - hoped.T[: self._count, :, None]) / span_of(self._front)[:, None, None]
        gain: Array = ahead.max(axis=0).min(axis=1)  # by how much no point of the front is as good
        if not self._constrained:
            return gain
        kept = mean[:, -1] - 0.5 * self._courage * deviation[:, -1] <= 0
        return np.where(kept, gain, -1000.0 - mean[:, -1])


def _known(count: int, front: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Places of the points that a model is made of: the front, evenly thinned to half of them, and the latest."""
    if count <= _POINTS:
        return np.arange(count)
    some = front[np.linspace(0, len(front) - 1, min(len(front), _POINTS // 2)).astype(int)]
    others = np.setdiff1d(np.arange(count), some)
    return np.concatenate((some, others[len(some) - _POINTS :]))


def _log(values: Array) -> Array:
    """Each column on a scale that is linear up to its median and logarithmic above; signs are kept."""
    middle = np.median(np.abs(values), axis=0)
    scaled = values / np.where(middle > 0, middle, 1.0)
    out: Array = np.sign(scaled) * np.log1p(np.abs(scaled))
    return out
