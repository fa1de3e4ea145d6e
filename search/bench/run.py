"""Searches on a problem: one curve of hypervolume for each sampler and seed."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning

from natsl.search.bench.problems import Array, Problem, layers
from natsl.search.pareto import dominated_volume
from natsl.search.rungs import Result, goes_on
from natsl.search.samplers import Sampler, make_sampler
from natsl.search.samplers.history import SHARE


@dataclass(frozen=True)
class Setting:
    """What all samplers have in common.

    Searches from seeds 0, 1, …; how many of the problem's first policies; the share of moves near the knee; whether
    policies are judged on a part of the data first, where the problem has parts.
    """

    seeds: int
    anchors: int
    local_share: float = 0.0
    in_parts: bool = False


@dataclass(frozen=True)
class Curves:
    """Hypervolume [seeds, evaluations] after 1, 2, … evaluations' worth of data, 1 is the best known front.

    ``seconds`` of a proposal.
    """

    problem: str
    sampler: str
    volumes: Array
    seconds: float


def curves(problem: Problem, sampler: Sampler, evaluations: int, setting: Setting) -> Curves:
    """Searches of so many evaluations; a shorter one is the beginning of a longer one."""
    in_parts = setting.in_parts and bool(problem.partial)
    volumes, seconds, trials = np.zeros((setting.seeds, evaluations)), 0.0, 0
    for seed in range(setting.seeds):
        study = optuna.create_study(directions=["minimize"] * 2)
        front, judge, done, index = np.empty((0, 2)), _Judge(problem), 0.0, 0
        while done < evaluations:
            start = time.perf_counter()
            anchor = index < setting.anchors and index < len(problem.first)
            if anchor:
                study.enqueue_trial(dict(problem.first[index]))
            trial = propose(study, problem.names, make_sampler(sampler, setting.local_share, seed, index))
            seconds += time.perf_counter() - start
            u = np.array([trial.params[name] for name in problem.names])
            share, values, broken = judge(u, everything=anchor or not in_parts)
            if problem.constrained:
                trial.set_constraint("broken", broken)
            if share < 1:
                trial.set_user_attr(SHARE, share)
            study.tell(trial, values.tolist())
            if broken <= 0 and share == 1:
                front = np.concatenate((front, values[None]))
            done, index = done + share, index + 1
            volumes[seed, math.ceil(done - 1e-9) - 1 :] = dominated_volume(front) / problem.best
        trials += index
    name = sampler.value + (", in parts" if in_parts else "")
    return Curves(problem.name, name, volumes[:, :evaluations], seconds / trials)


class _Judge:
    """Evaluates numbers on parts of the data, one after another, as a search does."""

    def __init__(self, problem: Problem) -> None:
        self._parts = {**problem.partial, 1.0: problem.evaluate}
        self._results: dict[float, list[Result]] = {share: [] for share in self._parts}

    def __call__(self, u: Array, everything: bool) -> tuple[float, Array, float]:
        """The share of the data that it was judged on, the objectives there, and by how much constraints are broken."""
        for share, evaluate in self._parts.items():
            values, broken = evaluate(u)
            own = (*values.tolist(), max(0.0, broken))
            same, complete = self._results[share], self._results[1.0]
            stops = share < 1 and not everything and not goes_on(own, same, complete)
            same.append(own)
            if stops:
                break
        return share, values, broken


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
