"""NSGA-II: an evolution that prefers what nothing dominates, and among equals the less crowded (Deb et al. 2002)."""

from __future__ import annotations

from optuna.samplers import BaseSampler, NSGAIISampler

_POPULATION = 20


def make(seed: int) -> BaseSampler:
    """The sampler whose draws come from this seed."""
    return NSGAIISampler(seed=seed, population_size=_POPULATION)
