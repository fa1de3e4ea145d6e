"""Local moves near the knee of the front, in front of any sampler.

A sampler spreads its trials over all of the front; most users want a policy from around the knee.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from natsl.search.samplers.moves import Params, between, front_of, neighbours, shift

# How many points of the front moves start from, the share of them that fill a gap between two points, and how far
# numbers move (powers of 10, as a share of their range).
_PARENTS = 8
_BETWEEN = 0.5
_STEP = (-2.3, -1.0)


class NearKneeSampler(BaseSampler):
    """Proposes a policy between two neighbours on the front near its knee, or beside one of its points.

    Parameters that the move leaves open are drawn by ``base``, and so are all of them while there is no front. Makes
    one trial: a move is a function of the seed and the results.
    """

    def __init__(self, base: BaseSampler, seed: int) -> None:
        self._base = base
        self._seed = seed
        self._move: dict[str, Any] = {}
        self._drawn: dict[str, Any] | None = None  # relative parameters of the base

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        self._move, known = _propose(study, Random(self._seed))
        self._drawn = None
        return {name: known[name] for name in self._move}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._move

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        if self._drawn is None:
            # Only when a parameter is open: an evolution counts whom it is asked for, and a whole move is no child.
            space = self._base.infer_relative_search_space(study, trial)
            self._drawn = self._base.sample_relative(study, trial, space)
        if param_name in self._drawn:
            value = self._drawn[param_name]
            if param_distribution._contains(param_distribution.to_internal_repr(value)):  # as Optuna's trial does
                return value
        return self._base.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._base.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._base.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        self._base.reseed_rng()


def _propose(study: Study, random: Random) -> tuple[Params, dict[str, BaseDistribution]]:
    """A move and the distributions of its parameters; both empty while no trial keeps all constraints."""
    front, scaled = front_of(study)
    if not front:
        return {}, {}
    best = np.argsort(scaled.sum(axis=1), kind="stable")[:_PARENTS].tolist()
    parent = front[random.choice(best)]
    if random.random() < _BETWEEN:
        pair = neighbours(scaled, random, set(best))
        if pair is not None:
            mixed = between(front[pair[0]], front[pair[1]], random.random())
            if mixed is not None:
                return mixed, front[pair[0]].distributions
    return _beside(parent, random), parent.distributions


def _beside(parent: FrozenTrial, random: Random) -> Params:
    """Parameters of a trial with some numbers moved a little."""
    numbers = {k: d for k, d in parent.distributions.items() if isinstance(d, FloatDistribution)}
    params = dict(parent.params)
    step = 10 ** random.uniform(*_STEP)
    for name, distribution in numbers.items():
        if random.random() < 0.5 or len(numbers) == 1:
            shift(params, name, random.gauss(0.0, step), distribution)
    return params
