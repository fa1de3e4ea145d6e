"""Sweeps of one number at a time, then coordinate and pairwise moves along the front: the baseline without a model.

In most models few layers or heads matter. A sweep finds them, and the front of the sweeps is where the rest begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState

from natsl.search.samplers.moves import Params, between, front_of, made, neighbours, shift

# Shares of its range at which each number is swept, coarse to fine, and for how many trials at most.
_LEVELS = (0.5, 0.35, 0.7, 1.0, 0.27, 0.42, 0.6, 0.2, 0.85, 0.31, 0.38, 0.46)
_SWEEPS = 42
# Shares of the moves: between two neighbours, of one number (the rest: of two), and of those of one number the shares
# that set it to its lowest or to anything. How far numbers move: powers of 10, as a share of their range.
_BETWEEN, _SINGLE, _NOTHING, _ANYWHERE = 0.35, 0.4, 0.2, 0.2
_STEP = (-2.3, -0.7)
_TRIES = 20  # to find a move that is new


def make(seed: int) -> BaseSampler:
    """The sampler whose draws come from this seed."""
    return _SweepSampler(seed)


class _SweepSampler(BaseSampler):
    """Makes one trial: a function of the seed and of the results of the study."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._random = RandomSampler(seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return complete[0].distributions if complete else {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        numbers = {k: d for k, d in search_space.items() if isinstance(d, FloatDistribution)}
        if not numbers:
            return {}
        tried = {_key(other.params, numbers) for other in made(study)}
        random = Random(self._seed)
        for level in _sweeps(numbers):
            untried = [params for params in level if _key(params, numbers) not in tried]
            if untried:
                return random.choice(untried)
        moves = _moves(study, numbers, random)
        return next((params for params in moves if _key(params, numbers) not in tried), {})

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._random.sample_independent(study, trial, param_name, param_distribution)


def _key(params: Params, numbers: dict[str, FloatDistribution]) -> tuple[float | None, ...]:
    return tuple(map(params.get, numbers))


def _sweeps(numbers: dict[str, FloatDistribution]) -> Iterator[list[Params]]:
    """For one level after another, each number at it and the others at their lowest (on a log scale: in the middle)."""
    swept = {name: d for name, d in numbers.items() if not d.log}
    base = {name: (d.low * d.high) ** 0.5 if d.log else d.low for name, d in numbers.items()}
    for level in _LEVELS[: max(2, _SWEEPS // max(1, len(swept)))]:
        yield [base | {name: d.low + level * (d.high - d.low)} for name, d in swept.items()]


def _moves(study: Study, numbers: dict[str, FloatDistribution], random: Random) -> Iterator[Params]:
    """Points beside and between those of the front; none while no trial keeps all constraints."""
    front, scaled = front_of(study)
    for _ in range(_TRIES if front else 0):
        pair = neighbours(scaled, random) or (0, 0)
        kind = random.random()
        if kind < _BETWEEN:
            mixed = between(front[pair[0]], front[pair[1]], random.random())
            if mixed is not None:
                yield mixed
            continue
        params = dict(front[random.choice(pair)].params)
        step = 10 ** random.uniform(*_STEP)
        if kind < _BETWEEN + _SINGLE or len(numbers) == 1:
            name = random.choice(list(numbers))
            how = random.random()
            if how < _NOTHING and not numbers[name].log:
                params[name] = numbers[name].low
            elif how < _NOTHING + _ANYWHERE:
                shift(params, name, random.uniform(-1.0, 1.0), numbers[name])
            else:
                shift(params, name, random.gauss(0.0, step), numbers[name])
        else:
            size = abs(random.gauss(0.0, step))
            for name, sign in zip(random.sample(list(numbers), 2), (1, -1), strict=True):
                shift(params, name, sign * size, numbers[name])
        yield params
