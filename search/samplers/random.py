"""Independent uniform draws: what a sampler has to beat."""

from __future__ import annotations

from optuna.samplers import BaseSampler, RandomSampler


def make(seed: int) -> BaseSampler:
    """The sampler whose draws come from this seed."""
    return RandomSampler(seed=seed)
