"""A tree-structured Parzen estimator of all numbers jointly (Bergstra et al. 2011; Optuna's multivariate form)."""

from __future__ import annotations

from optuna.samplers import BaseSampler, TPESampler

_STARTUP = 16  # random trials before the first estimate; the anchors of the space count


def make(seed: int) -> BaseSampler:
    """The sampler whose draws come from this seed."""
    return TPESampler(seed=seed, multivariate=True, n_startup_trials=_STARTUP)
