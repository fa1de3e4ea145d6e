"""Configuration of a search: what is varied, what is wanted, how long it looks. No torch and no optuna at import."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import Any

from natsl.config import ModelConfig, SupernetConfig, TrainConfig
from natsl.files import check_name
from natsl.search.samplers import Sampler
from natsl.space.check import check, check_counts
from natsl.space.policy import Op
from natsl.space.space import Control, SearchSpace
from natsl.tasks import DataConfig
from natsl.tracking import TrackingConfig


class Launcher(Enum):
    """Where evaluations are made."""

    local = "local"  # in worker processes on this machine
    slurm = "slurm"  # in worker processes of Slurm jobs
    inline = "inline"  # in the process of the search itself, one after another: to debug


# Parameters of submitit that are options here, or would start more than one process in a job.
_NOT_EXTRA = ("partition", "time", "timeout_min", "gpus_per_node", "num_gpus", "cpus_per_task", "mem", "mem_gb")
_ONE_TASK = ("nodes", "ntasks_per_node", "tasks_per_node")


@dataclass
class SlurmConfig:
    """What each Slurm job of a search asks for.

    partition: of the cluster (null: its default).
    timeout: minutes after which Slurm ends a job; another one is submitted then.
    gpus: a job has a worker on each (0: one on the CPU).
    cpus: cores, shared out among the workers of the job.
    memory: GB (null: the cluster's default).
    extra: further parameters of submitit's SlurmExecutor by name, such as {account: mine, qos: high}.
    """

    partition: str | None = None
    timeout: int = 60
    gpus: int = 1
    cpus: int = 4
    memory: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        p = "search.slurm."
        check_counts(1, {p + "timeout": self.timeout, p + "cpus": self.cpus})
        check_counts(0, {p + "gpus": self.gpus})
        memory = self.memory
        check(memory is None or 0 < memory < math.inf, p + "memory", memory, "it must be above 0")
        for name, value in self.extra.items():
            allowed = "partition, timeout, gpus, cpus and memory are options of search.slurm itself"
            check(name not in _NOT_EXTRA, f"{p}extra.{name}", value, allowed)
            check(name not in _ONE_TASK, f"{p}extra.{name}", value, "a job is one task on one node")


@dataclass
class SearchConfig:
    """One search over the routing policies of a trained supernet.

    n_trials: how many policies are tried.
    max_hours: how long the search may take over all calls of the same command, training included, until its last trial
        (null: any time). Then no policy is proposed any more; those that are open are finished, and the front is scored
        and reported as usual. A larger number later goes on.
    anchors: how many policies of the space's own are tried first, one-layer sweeps among them (null: a quarter of
        ``n_trials`` when the search begins).
    local_share: share of the trials that move a policy near the knee of the front a little instead of asking the
        sampler.
    objectives: names from the registry in ``natsl.search.objective``, all minimised.
    constraints: upper bounds by objective name; what breaks one is no candidate for the front.
    context: tokens, the length at which memory and compute are counted (null: ``data.seq_len``, where the fractions
        that they are counted from are measured).
    cost_batch_size: sequences at once, for the objectives decode_ms and prefill_ms.
    lengths: multiples of ``data.seq_len`` at which some points are measured again after the search, such as [1, 2, 4],
        with more to recall in proportion; on a GPU also at ``context``.
    policies: JSON files of policies that are tried first (with a list per layer where
        ``space.granularity`` is head, else with one number).
    rungs: shares of the held-out sequences on which a policy is judged, one after another; one that is not among the
        better on a part goes no further, and its values are those of the part. [1] judges all policies on all.
    random_draws: how often random routing is drawn beside a point.
    uniform_budgets: baselines with one budget in every layer.
    max_failure_rate, min_failures: the search stops once at least so many trials, and more than this share, failed.
    storage: an Optuna database URL (null: ``study.db`` in the run's folder).
    launcher: what makes the evaluations; slurm needs a ``storage`` that all nodes reach.
    workers: processes that evaluate policies (null: one for each GPU that ``device`` allows, else one); several on a
        GPU share it. With slurm: jobs (null: one), each with a worker for each of its GPUs.
    slurm: what the jobs of the launcher slurm ask for.
    batch: how many policies are proposed before a result of one of them is used, which the same seed then makes the
        same, however many workers there are (null: 1 with one worker, else four for each, when the search begins).
    synchronous: false proposes a policy whenever a worker is free: which ones then depends on how fast they are.
    trial_timeout: seconds after which a task, be it an evaluation or a whole control, counts as hung, and its process
        is killed (null: never).
    lease_seconds: a worker that gives no sign of life for so long is taken to be lost, and another one evaluates.
    """

    n_trials: int = 140
    max_hours: float | None = None
    sampler: Sampler = Sampler.sweep
    anchors: int | None = None
    local_share: float = 0.35
    objectives: list[str] = field(default_factory=lambda: ["recall_error", "kept_fraction"])
    constraints: dict[str, float] = field(default_factory=dict)
    space: SearchSpace = field(default_factory=SearchSpace)
    context: int | None = None
    cost_batch_size: int = 1
    lengths: list[int] = field(default_factory=list)
    policies: list[str] = field(default_factory=list)
    rungs: list[float] = field(default_factory=lambda: [0.25, 1.0])
    random_draws: int = 5
    uniform_budgets: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.15, 0.25, 0.375, 0.5, 0.75])
    batch_size: int = 32
    max_failure_rate: float = 0.5
    min_failures: int = 5
    storage: str | None = None
    launcher: Launcher = Launcher.local
    workers: int | None = None
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    batch: int | None = None
    synchronous: bool = True
    trial_timeout: float | None = None
    lease_seconds: float = 60.0

    def __post_init__(self) -> None:
        p = "search."
        check_counts(
            1, {p + k: getattr(self, k) for k in ("n_trials", "batch_size", "cost_batch_size", "min_failures")}
        )
        check_counts(1, {p + "context": 1 if self.context is None else self.context})
        check(len(set(self.lengths)) == len(self.lengths), p + "lengths", self.lengths, "each may come once")
        check_counts(1, {f"{p}lengths[{i}]": factor for i, factor in enumerate(self.lengths)})
        check_counts(0, {p + "anchors": 0 if self.anchors is None else self.anchors})
        check_counts(2, {p + "random_draws": self.random_draws})
        check(len(self.objectives) > 0, p + "objectives", self.objectives, "at least one objective is needed")
        check(
            len(set(self.objectives)) == len(self.objectives), p + "objectives", self.objectives, "each may come once"
        )
        for name, bound in self.constraints.items():
            check(math.isfinite(bound), f"{p}constraints.{name}", bound, "it must be a finite upper bound")
        rising = all(a < b for a, b in pairwise([0.0, *self.rungs]))
        check(
            rising and self.rungs[-1:] == [1.0],
            p + "rungs",
            self.rungs,
            "they must rise from above 0, and the last must be 1",
        )
        check_counts(1, {f"{p}{k}": 1 if getattr(self, k) is None else getattr(self, k) for k in ("workers", "batch")})
        check(
            self.launcher is not Launcher.inline or self.workers in (None, 1),
            p + "workers",
            self.workers,
            "with search.launcher = inline there is none but the process itself",
        )
        for name in ("trial_timeout", "lease_seconds", "max_hours"):
            time = getattr(self, name)
            check(time is None or 0 < time < math.inf, p + name, time, "it must be above 0")
        served = self.storage is not None and not self.storage.startswith("sqlite")
        check(
            self.launcher is not Launcher.slurm or served,
            p + "storage",
            self.storage,
            "with search.launcher = slurm it must be a database server that all nodes reach, such as "
            "postgresql+psycopg://user@host/name (an SQLite file on a shared file system is not locked safely)",
        )
        for budget in self.uniform_budgets:
            check(0 < budget < 1, p + "uniform_budgets", budget, "each budget must lie in (0, 1)")
        check(0 <= self.local_share <= 1, p + "local_share", self.local_share, "it must lie in [0, 1]")
        check(0 <= self.max_failure_rate <= 1, p + "max_failure_rate", self.max_failure_rate, "it must lie in [0, 1]")


@dataclass
class SearchRunConfig:
    """A whole search: train a supernet (or take one), search its policies, report and export.

    ``name``: folder below ``root``; the same name again resumes. ``device``: auto, cpu, cuda or cuda:<n>.
    ``supernet_from``: name of a run below ``root`` whose finished supernet is searched instead of training one (its
    model is used; ``model``, ``train`` and ``supernet`` are then without effect). ``export``: whether the knee is
    exported at the end. ``allow_other_data``: whether a search goes on where its text has changed since it began; its
    report then says so.
    """

    name: str = "search"
    root: str = "runs"
    seed: int = 0
    device: str = "auto"
    supernet_from: str | None = None
    export: bool = True
    allow_other_data: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    supernet: SupernetConfig = field(default_factory=SupernetConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        check_name(self.name, "name")
        check_counts(0, {"seed": self.seed})

    def untrained_budgets(self) -> str | None:
        """A line for a search whose layers may have larger budgets than any had in training (None: they may not).

        Training draws means over the routed layers: one layer may have a multiple of that.
        """
        space, layers = self.search.space, self.model.layers.count(Op.routed)
        seen = min(1.0, self.supernet.budget_max * layers)
        asks = space.control is Control.budget and Op.routed in space.ops
        if not asks or space.budget_max <= seen:
            return None
        return (
            f"search.space.budget_max = {space.budget_max:g} asks for more than training saw: a layer had {seen:g} at "
            f"most (supernet.budget_max = {self.supernet.budget_max:g} over {layers} routed layers)"
        )
