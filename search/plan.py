"""What a search will take: its stages counted, one step and one score of each kind timed on the device.

Counts are those of ``natsl.search.pipeline``. What only the search itself can tell is assumed, and said: how many
trials go on to all sequences, and how many points a front has. ``natsl.search.outer.plan`` is about outer searches.
"""

from __future__ import annotations

import gc
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from natsl.answers import sequences_at
from natsl.calibrate import calibrate
from natsl.command import command
from natsl.data import Split, TaskData
from natsl.device import device_name
from natsl.evaluate import count
from natsl.model import RoutedLM, count_parameters
from natsl.run import Run
from natsl.search.baseline import Named, baselines
from natsl.search.config import Launcher, SearchRunConfig
from natsl.search.controls.comparer import Comparer, Rules
from natsl.search.controls.static import Shape, greedy_heads, most_evaluations
from natsl.search.families import Sweep, listed
from natsl.search.front import Kind
from natsl.search.objective import OBJECTIVES
from natsl.search.pipeline import COMPARED, IN_HINDSIGHT
from natsl.search.rungs import Parts
from natsl.search.score import RANDOM_POINTS, RANDOM_UNIFORM
from natsl.search.study import Problem, first_count
from natsl.search.worker.pool import worker_devices
from natsl.space.policy import Op, RoutingPolicy
from natsl.train import Trainer, TrainRecipe, compile_kernels
from natsl.tree import common_order

PROBE_SECONDS, FEWEST_STEPS, MOST_STEPS = 4.0, 3, 12  # of training, after the first step
CALIBRATION_PROBE = (2, 8)  # sequences
GROUP_SECONDS = 5.0  # of scores in one pass
# What a search finds, in the default one and in that of the preset ``small``.
GOES_ON = 0.5  # of the trials that are judged on a part first
FRONT_POINTS = 16  # at most one for each trial
FAMILY_MEMBERS = 8  # of a family, that nothing in it dominates
# Of the default search on a CPU: what a trial takes beside its scores, and what it leaves.
TRIAL_SECONDS, TRIAL_BYTES, STUDY_BYTES = 0.05, 1_500, 110_000
REPORT_SECONDS, REPORT_BYTES = 2.0, 600_000
CONTROL_ROWS = 20  # of a point, in scores.jsonl
WRITTEN = "one more while it is written"
EXPORT_LOADS = 2.5  # fresh processes that load torch and transformers, in units of loading torch here


@dataclass(frozen=True)
class Stage:
    """A part of a search: what is done, how often, the seconds of each and those that come but ``once``."""

    name: str
    work: str
    count: float = 0
    each: float = 0.0
    once: float = 0.0

    @property
    def seconds(self) -> float:
        """Of all of it."""
        return self.count * self.each + self.once


@dataclass(frozen=True)
class Amount:
    """Bytes of something; ``source``: exact, measured, or an estimate."""

    name: str
    bytes: float
    source: str


@dataclass(frozen=True)
class Plan:
    """What a search will take on a device."""

    device: str
    stages: tuple[Stage, ...]
    memory: tuple[Amount, ...]
    disk: tuple[Amount, ...]
    notes: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)


@dataclass(frozen=True)
class Start:
    """Seconds until a search begins: to load torch, and to read the text."""

    load: float
    text: float


@dataclass(frozen=True)
class Probe:
    """Seconds of single things: a training step and the first one, the calibration, a score.

    ``score``: of a policy on the search split by itself, ``shared`` with others in a pass, ``test`` on the test split.
    """

    first_step: float
    step: float
    calibration: float
    score: float
    shared: float
    test: float


@dataclass(frozen=True)
class Measured:
    """What was timed, and how large it was: bytes of the weights, of the optimiser's states, of the memory taken."""

    probe: Probe
    weights: float
    optimizer: float
    memory: tuple[Amount, ...]


def make_plan(config: SearchRunConfig, problem: Problem, data: TaskData, device: torch.device, start: Start) -> Plan:
    """The plan of a search, of whose parts ``prepare`` has made ``problem`` and ``data``; errors as ``measure``."""
    measured = measure(config, problem, data, device)
    stages = _stages(config, problem, measured.probe, data, device, start)
    checkpoints = checkpoint_amounts(config, measured)
    disk = (*checkpoints, *search_amounts(config, problem, measured.weights))
    return Plan(device_name(device), tuple(stages), measured.memory, disk, tuple(notes(config)))


def measure(config: SearchRunConfig, problem: Problem, data: TaskData, device: torch.device) -> Measured:
    """Time single things of a search, with a model of its own that is trained for some steps.

    ``torch.OutOfMemoryError`` where the search would have it too.
    """
    torch.manual_seed(config.seed)
    model = RoutedLM(config.model, config.supernet.calibration_points, config.train.precision).to(device)
    trains = config.supernet_from is None
    first_step = step = optimizer = 0.0
    recipe = TrainRecipe(config.train, config.supernet, config.seed)
    if trains:
        trainer = Trainer(model, data, recipe)
        before = _peak(device)
        if device.type == "cuda":
            first_step = _seconds(partial(compile_kernels, config.model, data.config.seq_len, recipe, device))
        first, step = _step_seconds(trainer)
        first_step += first
        states = trainer.optimizer.state.values()
        optimizer = float(sum(x.numel() * x.element_size() for state in states for x in state.values()))
        trained = _peak(device)
        trainer.optimizer.zero_grad(set_to_none=True)
        del trainer
        gc.collect()
    model.eval()
    probe = _scores(model, data, config, problem, (first_step, step))
    weights = float(sum(x.numel() * x.element_size() for x in model.parameters()))
    memory = [Amount("parameters", weights, f"exact, {count_parameters(model):,}")]
    if trains:
        memory.append(Amount("gradients and optimiser", weights + optimizer, "exact"))
        rest = max(0.0, trained - before - weights - optimizer)
        of = "" if device.type == "cuda" else ": what the process grew by"
        memory.append(Amount(f"a training step of {config.train.batch_size} sequences", rest, f"measured{of}"))
    where = "on the device" if device.type == "cuda" else "of the process, libraries and text included"
    memory.append(Amount("largest size so far", _peak(device), f"measured, {where}"))
    return Measured(probe, weights, optimizer, tuple(memory))


def _step_seconds(trainer: Trainer) -> tuple[float, float]:
    """Seconds of the first training step and of a later one: their mean, as their policies differ."""

    def take(step: int) -> None:
        trainer.step(step)
        trainer.read()  # waits for it

    trainer.model.train()
    first, times = _seconds(partial(take, 0)), list[float]()
    while len(times) < FEWEST_STEPS or (sum(times) < PROBE_SECONDS and len(times) < MOST_STEPS):
        times.append(_seconds(partial(take, len(times) + 1)))
    return first, statistics.fmean(times)


def _seconds(function: Callable[[], object]) -> float:
    """How long something takes that waits for the device by itself."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _scores(
    model: RoutedLM, data: TaskData, config: SearchRunConfig, problem: Problem, steps: tuple[float, float]
) -> Probe:
    """Time the calibration and scores, of policies as the search has them; ``steps``: as ``_step_seconds``."""
    settings, kinds, chunk = config.search, problem.kinds, problem.chunk_size
    calibration = _calibration_seconds(model, data, config)
    uniform = RoutingPolicy.uniform(kinds, chunk, 0.25)
    singles = [uniform, RoutingPolicy.all_softmax(kinds, chunk), RoutingPolicy.all_delta(kinds, chunk)]
    parts = Parts(model, data.eval_sets(Split.search), settings.rungs, settings.batch_size)
    parts.judge(singles[-1])  # warms up
    scores = [_seconds(partial(parts.judge, policy)) for policy in singles]
    score = statistics.fmean(scores)
    members = {item.policy for _, items in _families(config, problem) for item in items}
    group = sorted(members, key=common_order)[: max(1, min(settings.batch_size, int(GROUP_SECONDS / score)))]
    shared = _seconds(partial(parts.judge_each, group, False)) / len(group) if len(group) > 1 else score
    sets = data.eval_sets(Split.test)
    test = _seconds(partial(count, model, uniform, sets, batch_size=settings.batch_size)) * score / scores[0]
    return Probe(*steps, calibration, score, shared, test)


def _calibration_seconds(model: RoutedLM, data: TaskData, config: SearchRunConfig) -> float:
    """Of all sequences, from two calibrations on few; the model has a table afterwards."""

    def run(size: int) -> float:
        few = replace(config.supernet, calibration_sequences=size)
        return _seconds(partial(calibrate, model, data, few, config.seed))

    most = config.supernet.calibration_sequences
    low, high = (min(size, most) for size in CALIBRATION_PROBE)
    run(low)  # warms up
    seconds = {size: run(size) for size in (low, high)}
    if high == most:
        return seconds[high]
    return seconds[high] + (most - high) * max(0.0, seconds[high] - seconds[low]) / (high - low)


def _families(config: SearchRunConfig, problem: Problem) -> list[tuple[object, list[Named]]]:
    settings = config.search
    sweep = Sweep(problem.kinds, problem.chunk_size, problem.heads, settings.space, tuple(settings.uniform_budgets))
    return [(family, members) for family, members in listed(sweep)]


def _stages(
    config: SearchRunConfig, problem: Problem, probe: Probe, data: TaskData, device: torch.device, start: Start
) -> list[Stage]:
    stages = [Stage("start", "loading torch, reading the text", once=start.load + start.text)]
    if _timed_names(config):
        stages.append(_latency_stage(config, problem, device))
    if config.supernet_from is None:
        stages += training_stages(config, probe, config.train.steps, 1)
    stages += search_stages(config, problem, probe, data, device, start)
    search = next(i for i, stage in enumerate(stages) if stage.name == "search")
    before = sum(stage.seconds for stage in stages[:search])
    drawn = config.search.n_trials - _first(config, problem)
    stages[search] = _within_hours(stages[search], drawn, config.search.max_hours, before)
    return stages


def _first(config: SearchRunConfig, problem: Problem) -> int:
    """How many policies are tried before the sampler draws."""
    return min(config.search.n_trials, len(problem.first), first_count(config.search, problem.given))


def training_stages(config: SearchRunConfig, probe: Probe, steps: float, calibrations: float) -> list[Stage]:
    """Supernets trained for so many steps in all, and calibrated so often."""
    work, once = f"steps of {config.train.batch_size} sequences", max(0.0, probe.first_step - probe.step)
    sequences = config.supernet.calibration_sequences
    calibrate = Stage("calibrate", "sequences", calibrations * sequences, probe.calibration / sequences)
    return [Stage("train", work, steps, probe.step, once), calibrate]


def search_stages(
    config: SearchRunConfig,
    problem: Problem,
    probe: Probe,
    data: TaskData,
    device: torch.device,
    start: Start,
) -> list[Stage]:
    """What comes after the training, whatever ``search.max_hours`` is."""
    settings, stages = config.search, list[Stage]()
    if settings.launcher is not Launcher.inline:
        stages.append(Stage("workers", "loading torch, reading the text", once=start.load + start.text))
    # Workers on GPUs of their own share the scores; on a CPU they share the cores, which one of them has as well. Jobs
    # have cores of their own.
    devices = worker_devices(settings, device)
    gpus = len(devices if settings.launcher is Launcher.slurm else set(devices))
    score = probe.score if settings.batch == 1 else probe.score / gpus
    probe = replace(probe, score=probe.score / gpus, shared=probe.shared / gpus, test=probe.test / gpus)
    first = _first(config, problem)
    stages.append(Stage("anchors", "policies, several in a pass", first, probe.shared))
    drawn = settings.n_trials - first
    trials = settings.n_trials * TRIAL_SECONDS
    scores = drawn * _mean_share(settings.rungs)
    stages.append(Stage("search", f"scores of {drawn} further trials", scores, score, trials))
    heads = sum(shape.heads for shape in problem.costs.shapes if shape.kind is Op.routed)
    stages.append(Stage("heads", "scores of whole heads", most_evaluations(heads), probe.score))
    families = _families(config, problem)
    policies = {item.policy for _, members in families for item in members}
    stages.append(Stage("families", "different policies, several in a pass", len(policies), probe.shared))
    points = min(settings.n_trials, FRONT_POINTS)
    tests = _tests(config, problem, points, len(families))
    stages.append(Stage("test", f"scores of a front of {points} and what is beside it", tests, probe.test))
    seen = [i < IN_HINDSIGHT for i in range(min(points, COMPARED))]
    rules = Rules(config.seed, settings.random_draws, config.supernet.route_noise)
    ends = [RoutingPolicy.all_delta(problem.kinds, problem.chunk_size)]
    passes = Comparer(lambda policy, name, draw: {}, problem.costs.shapes, ends, rules).planned(seen)
    stages.append(Stage("controls", f"scores for {len(seen)} points", passes, probe.test))
    stages += _length_stages(config, problem, probe, data, device, len(seen))
    stages.append(Stage("report", "drawn and written", once=REPORT_SECONDS))
    if config.export:
        stages.append(Stage("export", "the knee, verified in fresh processes", once=EXPORT_LOADS * start.load))
    return stages


def _within_hours(search: Stage, trials: int, hours: float | None, before: float) -> Stage:
    """The stage of the trials as far as ``search.max_hours`` allows it after so many seconds ``before`` it."""
    left = math.inf if hours is None else max(0.0, 3600 * hours - before)
    if search.seconds <= left:
        return search
    share = left / search.seconds
    work = f"scores of about {trials * share:.0f} of {trials} further trials: search.max_hours = {hours:g} ends them"
    return replace(search, work=work, count=share * search.count, once=share * search.once)


def _mean_share(rungs: Sequence[float]) -> float:
    """Share of the sequences that a trial is judged on in the mean."""
    share, before, going = 0.0, 0.0, 1.0
    for rung in rungs:
        share += going * (rung - before)
        before, going = rung, going * GOES_ON
    return share


def _tests(config: SearchRunConfig, problem: Problem, points: int, families: int) -> int:
    """Scores on the test split: of the front, of baselines, of the families' members, and of random routing."""
    settings = config.search
    heads = greedy_heads(Shape(problem.kinds, problem.heads, problem.chunk_size), lambda policy: (0.0,))
    fixed = baselines(problem.kinds, problem.chunk_size, settings.uniform_budgets, settings.space)
    uniform = sum(item.kind is Kind.uniform for item in fixed)
    beside = min(points, RANDOM_POINTS) + min(uniform, RANDOM_UNIFORM)
    return points + len(fixed) + len(heads) + families * FAMILY_MEMBERS + beside * settings.random_draws


def _length_stages(
    config: SearchRunConfig, problem: Problem, probe: Probe, data: TaskData, device: torch.device, points: int
) -> list[Stage]:
    """Points measured at other lengths, as ``LengthRunner`` does; attention is taken to cost no more per token."""
    own = data.config.seq_len
    lengths = {factor * own for factor in config.search.lengths} - {own}
    if device.type == "cuda" and problem.costs.context != own:
        lengths.add(problem.costs.context)
    if not lengths:
        return []
    tokens = sum(tokens * sequences_at(tokens, data.config) for tokens in lengths)
    each = probe.test * tokens / (own * data.config.test_sequences)
    shown = ", ".join(f"{length:,}" for length in sorted(lengths))
    return [Stage("lengths", f"points at {shown} tokens", points + 2, each)]


def _timed_names(config: SearchRunConfig) -> list[str]:
    names = (*config.search.objectives, *config.search.constraints)
    return [name for name in names if OBJECTIVES[name].timed]


def _latency_stage(config: SearchRunConfig, problem: Problem, device: torch.device) -> Stage:
    from natsl.latency import Setting, planned_seconds

    setting = Setting(config.model, config.train.precision, device, config.search.cost_batch_size)
    lengths = [problem.costs.context, *(factor * config.data.seq_len for factor in config.search.lengths)]
    names = " and ".join(_timed_names(config))
    return Stage("latency", f"times of layers, for {names}", once=planned_seconds(setting, lengths))


def checkpoint_amounts(config: SearchRunConfig, measured: Measured) -> list[Amount]:
    """What the checkpoints of a supernet take on disk."""
    train, size = config.train, measured.weights + measured.optimizer
    kept = min(train.keep_checkpoints, max(1, train.steps // train.checkpoint_every)) if measured.optimizer else 1
    amounts = [Amount(f"supernet/, checkpoints: {kept}", kept * size, "exact")]
    return [*amounts, *([Amount(WRITTEN, size, "exact")] if measured.optimizer else [])]


def search_amounts(config: SearchRunConfig, problem: Problem, weights: float) -> list[Amount]:
    """What the search of the policies leaves on disk."""
    settings, data = config.search, config.data
    amounts = [Amount("study.db", STUDY_BYTES + settings.n_trials * TRIAL_BYTES, "estimate")]
    points = min(settings.n_trials, FRONT_POINTS)
    tests = _tests(config, problem, points, len(_families(config, problem)))
    heads = sum(shape.heads for shape in problem.costs.shapes)
    rows = (tests + COMPARED * CONTROL_ROWS) * len(data.tasks)
    scores = rows * data.test_sequences * (3.0 * heads + 40) + settings.n_trials * 1_000
    amounts.append(Amount("scores.jsonl", scores, "estimate"))
    amounts.append(Amount("report, picture, front.json", REPORT_BYTES, "estimate"))
    if config.export:
        amounts.append(Amount("export/", weights + 300_000, "estimate"))
    return amounts


def notes(config: SearchRunConfig, verb: str = "search") -> list[str]:
    """What is assumed of a search, and whether the run that ``natsl <verb>`` would make exists."""
    lines = [
        f"assumed: {GOES_ON:.0%} of the trials go on to more sequences, a front of {FRONT_POINTS} points at most, "
        f"{FAMILY_MEMBERS} members of a family on the test split",
        "the progress of the search counts a policy in each of its families, and the draws of random routing beside a "
        "policy as one",
    ]
    if config.name in Run.names(config.root):
        again = command(verb, {"name": config.name, "root": None if config.root == "runs" else config.root})
        lines.append(f"the run {config.name!r} exists: what it has made is not made again by {again}")
    return lines


def _peak(device: torch.device) -> float:
    """Bytes: the most that was allocated on a GPU, or the largest size that the process has had."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)
