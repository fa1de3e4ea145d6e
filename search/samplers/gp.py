"""A Gaussian process over all numbers that maximises the expected gain in hypervolume (Optuna's GPSampler)."""

from __future__ import annotations

from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler
from optuna.trial import FrozenTrial

from natsl.search.samplers.history import history_of

_STARTUP = 8  # trials before the first model; the anchors of the space count


def make(seed: int) -> BaseSampler:
    """The sampler whose draws come from this seed."""
    return _NewOnly(seed=seed, n_startup_trials=_STARTUP, deterministic_objective=True, warn_independent_sampling=False)


class _NewOnly(GPSampler):
    """Draws at random instead of proposing what was tried: where no constraint can be kept, it would do so for ever."""

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        params = super().sample_relative(study, trial, search_space)
        history = history_of(study)
        if not params or params.keys() != history.space.keys() or not history.numbers:
            return params
        position = history.position(params)
        return {} if history.keys(position[None])[0] in history.tried else params
