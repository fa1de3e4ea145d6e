"""The front of a study, and moves from its points: what near_knee and sweep propose from."""

from __future__ import annotations

from itertools import pairwise
from random import Random
from typing import Any

import moocore
import numpy as np
import numpy.typing as npt
from optuna import Study
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState

Params = dict[str, Any]


def made(study: Study) -> list[FrozenTrial]:
    """Trials that have a result, or a reason why not: one that was cut off is proposed again as it was."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL))
    return [trial for trial in trials if trial.state is TrialState.COMPLETE or "reason" in trial.user_attrs]


def front_of(study: Study) -> tuple[list[FrozenTrial], npt.NDArray[np.float64]]:
    """Trials on the front and their objectives [points, objectives], scaled by the range of all trials."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    feasible = [i for i, trial in enumerate(trials) if all(value <= 0 for value in trial.constraints.values())]
    if not feasible:
        return [], np.empty((0, len(study.directions)))
    values = np.array([trial.values for trial in trials])
    chosen = np.array(feasible)[moocore.is_nondominated(values[feasible])]  # of several with equal values one
    span = np.ptp(values, axis=0)
    scaled = (values[chosen] - values.min(axis=0)) / np.where(span > 0, span, 1.0)
    return [trials[i] for i in chosen.tolist()], scaled


def neighbours(
    scaled: npt.NDArray[np.float64], random: Random, among: set[int] | None = None
) -> tuple[int, int] | None:
    """Two points that are next to each other in some objective, far apart ones more often; None if all are equal.

    ``among``: at least one of the two is one of these.
    """
    order = np.argsort(scaled[:, random.randrange(scaled.shape[1])], kind="stable").tolist()
    pairs = [(i, j) for i, j in pairwise(order) if among is None or i in among or j in among]
    gaps = [float(np.abs(scaled[i] - scaled[j]).sum()) for i, j in pairs]
    return random.choices(pairs, gaps)[0] if sum(gaps) > 0 else None


def between(first: FrozenTrial, second: FrozenTrial, share: float) -> Params | None:
    """Parameters on the line from one trial to another; None unless they have the same and differ in numbers."""
    if first.params.keys() != second.params.keys():
        return None
    params = {
        name: a + share * (second.params[name] - a) if isinstance(first.distributions[name], FloatDistribution) else a
        for name, a in first.params.items()
    }
    return params if params != first.params else None


def shift(params: Params, name: str, by: float, distribution: FloatDistribution) -> None:
    """Move one number by a share of its range, no further than its bounds."""
    moved = params[name] + by * (distribution.high - distribution.low)
    params[name] = min(max(moved, distribution.low), distribution.high)
