"""Searches on a problem: one curve of hypervolume for each sampler and seed."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning

from natsl.search.bench.problems import Array, Problem, volume
from natsl.search.samplers import Sampler, make_sampler


@dataclass(frozen=True)
class Curves:
    """Hypervolume [seeds, trials] after each trial, 1 is the best known front; seconds of a proposal."""

    problem: str
    sampler: str
    volumes: Array
    seconds: float


def curves(problem: Problem, sampler: Sampler, trials: int, seeds: int, local_share: float) -> Curves:
    """Searches from seeds 0, 1, …; at most a quarter of the trials are the problem's first ones."""
    volumes, seconds = np.zeros((seeds, trials)), 0.0
    for seed in range(seeds):
        study = optuna.create_study(directions=["minimize"] * 2)
        front = np.empty((0, 2))
        for index in range(trials):
            start = time.perf_counter()
            trial = _propose(study, problem, make_sampler(sampler, local_share, seed, index), index, trials)
            seconds += time.perf_counter() - start
            values, broken = problem.evaluate(np.array([trial.params[name] for name in problem.names]))
            if problem.constrained:
                trial.set_constraint("broken", broken)
            study.tell(trial, values.tolist())
            if broken <= 0:
                front = np.concatenate((front, values[None]))
            volumes[seed, index] = volume(front) / problem.best
    return Curves(problem.name, sampler.value, volumes, seconds / (seeds * trials))


def _propose(
    study: optuna.Study, problem: Problem, sampler: optuna.samplers.BaseSampler, index: int, trials: int
) -> optuna.Trial:
    study.sampler = sampler
    if index < min(len(problem.first), trials // 4):
        study.enqueue_trial(dict(problem.first[index]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        trial = study.ask()
        for name in problem.names:
            trial.suggest_float(name, 0.0, 1.0)
    return trial
