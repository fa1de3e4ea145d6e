"""Train the same supernet with one change at a time, over seeds, and compare what its router learned.

``natsl ablation`` writes ``runs/<name>/ablation.json`` and prints a Markdown table. A job that is done is
kept: the same command again runs what is missing. No torch at import.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from natsl.config import TRAINING_VERSION, ModelConfig, SupernetConfig, TrainConfig, check_batch, check_chunks
from natsl.device import resolve_device
from natsl.errors import UserError
from natsl.files import check_name, read_json, to_plain, write_json
from natsl.progress import Progress
from natsl.run import Run
from natsl.signals import TerminatedError, sigterm_raises
from natsl.space.check import check, check_counts
from natsl.tasks import DataConfig, drop_newer


@dataclass
class AblationConfig:
    """Variants of the supernet's training, each trained with every seed.

    ``variants``: name → fields of ``supernet`` that differ. ``budgets``: uniform budgets at which the learned router is
    judged, against ``random_draws`` draws of random routing at the same kept fraction per layer. ``workers``: processes
    at a time, one thread each.
    """

    name: str = "ablation"
    root: str = "runs"
    device: str = "auto"
    workers: int = 2
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    budgets: list[float] = field(default_factory=lambda: [0.05, 0.12])
    random_draws: int = 5
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    supernet: SupernetConfig = field(default_factory=SupernetConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_name(self.name, "name")
        check_counts(1, {"workers": self.workers, "random_draws": self.random_draws})
        check(len(self.seeds) > 0, "seeds", self.seeds, "at least one seed is needed")
        check(len(self.variants) > 0, "variants", self.variants, "at least one is needed, such as {base: {}}")
        check("mqar" in self.data.tasks, "data.tasks", self.data.tasks, "variants are judged by recall: mqar is needed")
        for budget in self.budgets:
            check(0 < budget < 1, "budgets", budget, "each budget must lie in (0, 1)")
        for name in self.variants:
            check_batch(self.model.layers, self.train, self.variant(name))

    def variant(self, name: str) -> SupernetConfig:
        """The supernet configuration of a variant; ``ValueError`` for a field or value that is not allowed."""
        known = {item.name for item in dataclasses.fields(SupernetConfig)}
        for key in self.variants[name]:
            check(key in known, f"variants.{name}", key, f"the fields are {', '.join(sorted(known))}")
        return dataclasses.replace(self.supernet, **self.variants[name])


@dataclass(frozen=True)
class Job:
    """One supernet to train and judge; the result goes to ``path``. ``text``: fingerprint of the text to use."""

    config: AblationConfig
    variant: str
    seed: int
    path: Path
    text: str | None = None

    def fingerprint(self, relative: bool = False) -> str:
        """What the result depends on, beside the text; ``relative`` is as older results from this folder have it."""
        c = self.config
        parts = [to_plain(x) for x in (c.model, c.data, c.variant(self.variant), c.train)]
        for name in ("include", "exclude", "field"):
            if not parts[1][name]:  # results from before there was a choice keep their fingerprints
                del parts[1][name]
        drop_newer(parts[1])
        if relative and c.data.path is not None:
            parts[1]["path"] = os.path.relpath(c.data.path)
        text = json.dumps([parts, self.seed, c.budgets, c.random_draws], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_job(job: Job) -> dict[str, Any]:
    """Train the supernet of one job, score it on the test split and write its result."""
    import tempfile

    import torch

    from natsl.data import Split, TaskData, load_text
    from natsl.evaluate import RandomRouting, evaluate
    from natsl.model import RoutedLM
    from natsl.space.policy import RoutingPolicy
    from natsl.train import TrainRecipe, train_supernet

    torch.set_num_threads(1)
    c = job.config
    data = TaskData(c.data, load_text(c.data.path, c.data.text_rules(c.root)), c.model.vocab_size)
    recipe = TrainRecipe(c.train, c.variant(job.variant), job.seed)
    torch.manual_seed(job.seed)
    points, precision = recipe.supernet.calibration_points, recipe.train.precision
    model = RoutedLM(c.model, points, precision).to(resolve_device(c.device))
    try:
        with sigterm_raises(), tempfile.TemporaryDirectory() as folder:
            train_supernet(model, data, recipe, Path(folder))
    except TerminatedError:
        os._exit(128 + signal.SIGTERM)  # a worker that is gone ends the pool, one that returns would be replaced
    sets = data.eval_sets(Split.test)
    kinds, chunk = model.kinds, c.model.chunk_size

    def recall(policy: RoutingPolicy, routing: RandomRouting | None = None) -> tuple[float, float, tuple[float, ...]]:
        result = evaluate(model, policy, sets, random_routing=routing)
        return 1.0 - (result.errors["recall_error"] or 0.0), result.kept_fraction, result.kept_by_layer

    scores: dict[str, Any] = {
        "softmax": recall(RoutingPolicy.all_softmax(kinds, chunk))[0],
        "delta": recall(RoutingPolicy.all_delta(kinds, chunk))[0],
    }
    for budget in c.budgets:
        policy = RoutingPolicy.uniform(kinds, chunk, budget)
        learned, kept, fractions = recall(policy)
        draws = [recall(policy, RandomRouting(draw, fractions))[0] for draw in range(c.random_draws)]
        scores[f"{budget:g}"] = {"learned": learned, "kept": kept, "random": statistics.mean(draws)}
    result = {"variant": job.variant, "seed": job.seed, "fingerprint": job.fingerprint(), "recall": scores}
    result["version"] = TRAINING_VERSION
    result["text"] = data.corpus.fingerprint
    write_json(job.path, result)
    return result


def run_jobs(jobs: list[Job], workers: int) -> Iterator[dict[str, Any]]:
    """Results of the jobs as they finish; those on disk come first. ``UserError`` if those are of other text."""
    waiting, versions = [], {}
    for job in jobs:
        old = read_json(job.path) if job.path.exists() else {}
        if old.get("fingerprint") in (job.fingerprint(), job.fingerprint(relative=True)):
            if job.text not in (None, old.get("text", job.text)):
                raise UserError(f"{job.path} is of other text than data.path holds now: choose another name")
            versions[job.path] = old.get("version", 1)  # older results do not have it
            yield old
        else:
            waiting.append(job)
    if not waiting:
        return
    other = next((path for path, version in versions.items() if version != TRAINING_VERSION), None)
    if other is not None:
        raise UserError(
            f"{other} is of a natsl that trains in another way (training version {versions[other]}, now "
            f"{TRAINING_VERSION}): finish the ablation with it or choose another name"
        )
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(waiting)), mp_context=context, max_tasks_per_child=1) as pool:
        try:
            for future in as_completed([pool.submit(run_job, job) for job in waiting]):
                yield future.result()
        except BaseException:
            for child in multiprocessing.active_children():  # else the pool would wait for all jobs
                child.terminate()
            raise


def table(results: list[dict[str, Any]], config: AblationConfig) -> str:
    """Markdown, a row per variant: mean recall (lowest seed); at each budget learned / random and the fraction kept."""
    heads = ["variant", "all-softmax", "all-delta"]
    heads += [f"{budget:g}: learned / random [kept]" for budget in config.budgets]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]

    def shown(values: list[float]) -> str:
        return f"{statistics.mean(values):.2f} ({min(values):.2f})"

    for name in config.variants:
        scores = [r["recall"] for r in results if r["variant"] == name]
        cells = ["–"] * (len(heads) - 1)
        if scores:
            cells = [shown([s[key] for s in scores]) for key in ("softmax", "delta")]
        for budget in config.budgets if scores else []:
            at = [s[f"{budget:g}"] for s in scores]
            random, kept = (statistics.mean(s[key] for s in at) for key in ("random", "kept"))
            cells.append(f"{shown([s['learned'] for s in at])} / {random:.2f} [{kept:.3f}]")
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def run_ablation(config: AblationConfig) -> None:
    """The command ``search.ablation``."""
    from natsl.data import TaskData, load_text

    check_chunks(config.model.chunk_size, config.data.seq_len)
    config = dataclasses.replace(config, device=str(resolve_device(config.device)))
    text = load_text(config.data.path, config.data.text_rules(config.root))
    TaskData(config.data, text, config.model.vocab_size)  # which refuses what does not go together
    run = Run.open(config.name, config.root)
    with run.lock():
        run.write_config(config)
        folder = run.path / "jobs"
        folder.mkdir(exist_ok=True)
        jobs = [
            Job(config, name, seed, folder / f"{i:02d}-{seed}.json", text.fingerprint)
            for seed in config.seeds
            for i, name in enumerate(config.variants)
        ]
        results: list[dict[str, Any]] = []
        with Progress("ablation", len(jobs)) as progress:
            for result in run_jobs(jobs, config.workers):
                results.append(result)
                run.write_json(run.path / "ablation.json", results)
                progress.update(len(results), f"{result['variant']}, seed {result['seed']}")
    print(table(results, config))


if __name__ == "__main__":
    from natsl.cli.main import run_verb

    run_verb("ablation")
