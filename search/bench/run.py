"""Searches on a problem: one curve of hypervolume for each sampler and seed."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning

from natsl.search.bench.problems import Array, Problem, layers, volume
from natsl.search.samplers import Sampler, make_sampler


@dataclass(frozen=True)
class Setting:
    """What all samplers have in common: searches from seeds 0, 1, …, and how many of the problem's first ones."""

    seeds: int
    anchors: int
    local_share: float = 0.0


@dataclass(frozen=True)
class Curves:
    """Hypervolume [seeds, trials] after each trial, 1 is the best known front; seconds of a proposal."""

    problem: str
    sampler: str
    volumes: Array
    seconds: float


def curves(problem: Problem, sampler: Sampler, trials: int, setting: Setting) -> Curves:
    """Searches of so many trials; a shorter one is the beginning of a longer one."""
    volumes, seconds = np.zeros((setting.seeds, trials)), 0.0
    for seed in range(setting.seeds):
        study = optuna.create_study(directions=["minimize"] * 2)
        front = np.empty((0, 2))
        for index in range(trials):
            start = time.perf_counter()
            if index < setting.anchors and index < len(problem.first):
                study.enqueue_trial(dict(problem.first[index]))
            trial = propose(study, problem.names, make_sampler(sampler, setting.local_share, seed, index))
            seconds += time.perf_counter() - start
            values, broken = problem.evaluate(np.array([trial.params[name] for name in problem.names]))
            if problem.constrained:
                trial.set_constraint("broken", broken)
            study.tell(trial, values.tolist())
            if broken <= 0:
                front = np.concatenate((front, values[None]))
            volumes[seed, index] = volume(front) / problem.best
    return Curves(problem.name, sampler.value, volumes, seconds / (setting.seeds * trials))


def propose(study: optuna.Study, names: list[str], sampler: optuna.samplers.BaseSampler) -> optuna.Trial:
    """The next trial of a study whose parameters are numbers in [0, 1]."""
    study.sampler = sampler
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        trial = study.ask()
        for name in names:
            trial.suggest_float(name, 0.0, 1.0)
    return trial


def proposal_times(sampler: Sampler, trials: int, local_share: float, count: int = 10) -> tuple[float, float]:
    """Seconds of a proposal, by the clock and of CPU time, in a study of so many trials of 12 numbers.

    The first proposal, which reads the study, is not counted, as in a search it is read trial by trial.
    """
    problem = layers()
    space: dict[str, BaseDistribution] = {name: FloatDistribution(0.0, 1.0) for name in problem.names}
    study = optuna.create_study(directions=["minimize"] * 2)
    for u in np.random.default_rng(0).random((trials, problem.size)) ** 3:
        params = dict(zip(space, u.tolist(), strict=True))
        values = problem.evaluate(u)[0].tolist()
        study.add_trial(optuna.trial.create_trial(params=params, distributions=space, values=values))
    walls, busy = [], []
    for index in range(count + 1):
        wall, start = time.perf_counter(), time.process_time()
        trial = propose(study, problem.names, make_sampler(sampler, local_share, 0, trials + index))
        walls.append(time.perf_counter() - wall)
        busy.append(time.process_time() - start)
        study.tell(trial, problem.evaluate(np.array(list(trial.params.values())))[0].tolist())
    return float(np.mean(walls[1:])), float(np.mean(busy[1:]))
