"""NSGA-III: NSGA-II with reference directions instead of crowding, for many objectives (Deb and Jain 2014)."""

from __future__ import annotations

from optuna.samplers import BaseSampler, NSGAIIISampler

_POPULATION = 20


def make(seed: int) -> BaseSampler:
    """The sampler whose draws come from this seed."""
    return NSGAIIISampler(seed=seed, population_size=_POPULATION)
