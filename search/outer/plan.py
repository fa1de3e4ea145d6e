"""What an outer search will take, by the probe of ``natsl.search.plan``: its supernets, and the search of the best one.

Which trials go on is decided by their values, which only the search itself can tell. Assumed, and said, is that a trial
is as likely to be at any place among those judged at a rung before it, and that all trials take the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from natsl.config import TrainConfig
from natsl.device import device_name
from natsl.search.outer.command import Prepared
from natsl.search.outer.config import OuterRunConfig, shown_settings
from natsl.search.outer.study import places
from natsl.search.outer.value import fixed_policies
from natsl.search.plan import (
    STUDY_BYTES,
    WRITTEN,
    Amount,
    Plan,
    Stage,
    Start,
    measure,
    notes,
    search_amounts,
    search_stages,
    training_stages,
)
from natsl.search.prepare import prepare

# Of an outer search with experiment=smoke: what a rung takes in study.db and outer.json, and the report.
RUNG_BYTES, OUTER_REPORT_BYTES = 3_500, 220_000


def make_outer_plan(config: OuterRunConfig, parts: Prepared, device: torch.device, start: Start) -> Plan:
    """The plan of an outer search made of ``parts``; errors as ``natsl.search.plan.measure``.

    Timed is one structure, that of the options themselves if the space holds it.
    """
    own = config.outer.space.own(config) or {}
    chosen = next((settings for settings in config.outer.space.structures() if settings.items() <= own.items()), None)
    settings = chosen or next(config.outer.space.structures())
    trial, problem, data, _ = prepare(config.trial("t0000", parts.root, settings))
    measured = measure(trial, problem, data, device)
    probe, rungs = measured.probe, parts.rungs
    reached = trials_at_rungs(supernets(config), config.outer.keep, len(rungs))
    steps = sum(count * (end - before) for count, (before, end) in zip(reached, pairwise([0, *rungs]), strict=True))
    judged, policies = sum(reached), len(fixed_policies(problem, config.search))
    stages = [
        Stage(
            "start",
            "loading torch, reading the text, once more for the last search",
            once=start.load + 2 * start.text,
        ),
        *training_stages(trial, probe, steps, judged),
        Stage("judge", f"{policies} policies after each rung, several in a pass", judged * policies, probe.shared),
    ]
    size = measured.weights + measured.optimizer
    ends = [count - after for count, after in pairwise([*reached, 0.0])]
    kept = sum(count * checkpoints(trial.train, rungs[: i + 1]) for i, count in enumerate(ends))
    disk = [
        Amount(f"trials/, checkpoints: {kept:.0f}", kept * size, "estimate"),
        Amount(WRITTEN, size, "exact"),
        Amount("study.db and outer.json of the trials", STUDY_BYTES + judged * RUNG_BYTES, "estimate"),
        Amount("their report and picture", OUTER_REPORT_BYTES, "estimate"),
        *search_amounts(trial, problem, measured.weights),
    ]
    return Plan(
        device_name(device),
        (*stages, *search_stages(trial, problem, probe, data, device, start)),
        measured.memory,
        tuple(disk),
        (*_assumed(config, settings, rungs, reached), *notes(config, "outer")),
    )


def supernets(config: OuterRunConfig) -> int:
    """How many trials are trained at most: of each choice of settings one, the others have its results."""
    space, trials = config.outer.space, config.outer.n_trials
    if any(log is not None for *_, log in space.axes()):
        return trials
    return min(trials, sum(1 for _ in space.structures()))


def trials_at_rungs(trials: int, keep: float, rungs: int) -> list[float]:
    """Nearly how many of so many trials are judged at each rung in the mean, if their places are a matter of chance.

    The number at a rung is taken to be its mean, rounded.
    """
    reached = [float(trials)]
    while len(reached) < rungs:
        judged = range(round(reached[-1]))
        reached.append(sum(places(others, keep) / (others + 1) for others in judged))
    return reached


def checkpoints(train: TrainConfig, rungs: Sequence[int]) -> int:
    """How many checkpoints are kept of a supernet that was judged at these steps and trained no further."""
    regular = range(train.checkpoint_every, rungs[-1] + 1, train.checkpoint_every)
    return min(train.keep_checkpoints, len({*regular, *rungs}))


def _assumed(
    config: OuterRunConfig, settings: dict[str, object], rungs: Sequence[int], reached: Sequence[float]
) -> list[str]:
    counts = ", ".join(f"{count:.3g} at step {step}" for count, step in zip(reached, rungs, strict=True))
    lines = [f"assumed: any place among the trials of a rung is as likely; judged are then {counts} in the mean"]
    if settings:
        lines.append(f"assumed: every trial takes as long as one with {shown_settings(settings)}")
    if reached[0] < config.outer.n_trials:
        lines.append(f"outer.space has {reached[0]:.0f} different settings: further trials have the results of those")
    lines.append("workers and all stages after judge: the search of the best trial's policies")
    return lines
