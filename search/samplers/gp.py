"""A Gaussian process over all numbers that maximises the expected gain in hypervolume (Optuna's GPSampler)."""

from __future__ import annotations

from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, GPSampler
from optuna.trial import FrozenTrial

from natsl.search.samplers.moves import made

_STARTUP = 8  # trials before the first model; the anchors of the space count
_SAME = 0.002  # of the range: numbers that are no further apart give the same policy, or nearly so


def make(seed: int) -> BaseSampler:
    """The sampler whose draws come from this seed."""
    return _NewOnly(seed=seed, n_startup_trials=_STARTUP, deterministic_objective=True, warn_independent_sampling=False)


class _NewOnly(GPSampler):
    """Draws at random instead of proposing what was tried: where no constraint can be kept, it would do so for ever."""

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        params = super().sample_relative(study, trial, search_space)
        spans = {k: d.high - d.low for k, d in search_space.items() if isinstance(d, FloatDistribution)}
        for other in made(study):
            known = other.params
            if params and all(k in known and abs(known[k] - params[k]) <= _SAME * span for k, span in spans.items()):
                return {}
        return params
