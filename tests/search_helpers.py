"""A synthetic supernet for tests of the search: recall as a smooth function of the kept fractions, no model at all."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from optuna.storages._rdb.storage import _VersionManager

from natsl.config import ModelConfig
from natsl.counts import Counts
from natsl.evaluate import Evaluation, summary
from natsl.run import Run
from natsl.search.baseline import baselines
from natsl.search.config import SearchConfig
from natsl.search.controls.comparer import Comparer, Rules
from natsl.search.controls.comparison import LEARNED, chosen_points
from natsl.search.families import Sweep, listed
from natsl.search.front import Baseline, Front, Point
from natsl.search.judge import Judge
from natsl.search.objective import CostContext, find_objectives
from natsl.search.pareto import Volume
from natsl.search.score import Scorer, knee_choice, score
from natsl.search.study import PolicyStudy, Problem, first_policies, open_policy_study
from natsl.space.cost import LayerShape
from natsl.space.policy import Op, RoutingPolicy
from natsl.tasks import metrics

# Optuna reads all of its migrations, which are always the same, whenever a storage is opened: here, once per URL.
_read_migrations = _VersionManager._create_alembic_script
_migrations: dict[str, Any] = {}


def _known_migrations(manager: _VersionManager) -> Any:
    if manager.url not in _migrations:
        _migrations[manager.url] = _read_migrations(manager)
    return _migrations[manager.url]


_VersionManager._create_alembic_script = _known_migrations  # type: ignore[method-assign, assignment]

ROUTED = (Op.routed, Op.routed, Op.routed)
CHUNK = 16
WORTH = (0.15, 1.0, 0.9)  # how much of the recall a layer can do by itself
HEADS = 2
SEQUENCES, CHUNKS, ASKED = 16, 10000, 10000


def noise(*parts: object) -> float:
    """A number in [−1, 1] fixed by its arguments."""
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:8], 16) / 2**31 - 1


def synthetic(policy: RoutingPolicy, split: str | float = 1.0, useful: float = 0.22) -> Evaluation:
    """Recall from how much of the ``useful`` share of chunks each layer keeps; random routing has ``useful`` = 1.

    ``split``: a name, or a share of the sequences of the search split.
    """
    split = "search" if split == 1 else split
    kept, error = [], 0.98
    for i, layer in enumerate(policy.layers):
        fraction = 1.0 if layer.op is Op.softmax else (layer.mean_budget() or 0.0)
        if 0 < fraction < 1:
            fraction = min(1.0, max(0.0, fraction * (1 + 0.03 * noise(policy.digest(), split, useful, i))))
        kept.append(fraction)
        worth = WORTH[i % len(WORTH)]
        error *= 1 - worth * min(1.0, fraction / useful) ** 0.8
    error = min(1.0, max(0.0, error + 0.004 * noise(policy.digest(), split, useful) * math.sqrt(error)))
    loss = 1.93 + 0.02 * sum(kept) / len(kept) + 0.002 * noise(policy.digest(), split, "loss", useful)
    by_head = tuple(tuple(min(1.0, f * (0.6 + 0.8 * h)) for h in range(HEADS)) for f in kept)
    errors = {**dict.fromkeys(metrics().values()), "recall_error": error}
    return Evaluation(loss, loss / math.log(2), errors, sum(kept) / len(kept), tuple(kept), by_head)


def synthetic_counts(policy: RoutingPolicy, name: str, draw: int) -> dict[str, Counts]:
    """Sequences of recall and of text: recall needs the right chunks, and no control changes the text."""
    useful = {LEARNED: 0.22, "hindsight": 0.2, "hindsight_layer": 0.2, "oracle": 0.2}.get(name, 1.0)
    learned, found = synthetic(policy, "test"), synthetic(policy, f"{name} {draw}", useful)
    kept = torch.tensor(learned.kept_by_layer, dtype=torch.float64)[None, :, None].expand(SEQUENCES, -1, HEADS)
    asked = torch.full((SEQUENCES,), ASKED)
    wrong = [round(ASKED * (found.errors["recall_error"] or 0.0) * (1 + 0.1 * noise(i))) for i in range(SEQUENCES)]
    nothing = torch.zeros(SEQUENCES, dtype=torch.int64)
    loss = learned.val_loss or 0.0
    nats = torch.tensor([64 * (loss + 0.1 * noise("text", i)) for i in range(SEQUENCES)], dtype=torch.float64)
    chunks = (kept * CHUNKS).round().long()
    recall = Counts(nats, nothing + 64, asked - torch.tensor(wrong).clamp(0, ASKED), asked, chunks, CHUNKS)
    text = Counts(nats, nothing + 64, nothing, nothing, chunks, CHUNKS)
    return {"mqar": recall} if name == "oracle" else {"mqar": recall, "bytes": text}


def synthetic_test(policy: RoutingPolicy) -> dict[str, Counts]:
    """Sequences of recall on the test split under the policy itself."""
    return {"mqar": synthetic_counts(policy, LEARNED, 0)["mqar"]}


def on_test(policy: RoutingPolicy) -> Evaluation:
    """What ``synthetic_test`` adds up to, of layers that are all routed."""
    return summary(synthetic_test(policy), [Op.routed] * len(policy.layers))


def synthetic_judge() -> Judge:
    """Judge of the synthetic supernet; random routing needs all chunks to find all pairs."""

    def random(policy: RoutingPolicy, fractions: tuple[float, ...], seed: int) -> Evaluation:
        return synthetic(policy, f"random {seed}", useful=1.0)

    def each(policies: Sequence[RoutingPolicy], trials: bool) -> list[dict[float, Evaluation]]:
        return [{share: synthetic(policy, share) for share in SearchConfig().rungs} for policy in policies]

    def length(policy: RoutingPolicy, tokens: int, count: int, tasks: tuple[str, ...]) -> Evaluation:
        return synthetic(policy, f"{tokens} tokens")

    return Judge(synthetic, each, synthetic_test, random, synthetic_counts, length)


def searching(search: Callable[[RoutingPolicy, float], Evaluation]) -> Judge:
    """The judge of the synthetic supernet with another search split."""

    def each(policies: Sequence[RoutingPolicy], trials: bool) -> list[dict[float, Evaluation]]:
        results: list[dict[float, Evaluation]] = []
        for policy in policies:
            try:
                results.append({1.0: search(policy, 1.0)})
            except FloatingPointError:
                results.append({})
        return results

    return replace(synthetic_judge(), search=search, search_each=each)


def shapes(kinds: Sequence[Op]) -> tuple[LayerShape, ...]:
    """Shapes of the default model."""
    return ModelConfig(layers=list(kinds)).layer_shapes()


def problem(config: SearchConfig, kinds: Sequence[Op] = ROUTED) -> Problem:
    """What a search over these kinds of layers asks."""
    objectives = find_objectives(config.objectives, {"mqar"}, config.constraints)
    first = first_policies(config, shapes(kinds), CHUNK, [])
    return Problem(tuple(kinds), CHUNK, CostContext(shapes(kinds), config.context or 384), objectives, first)


def with_tasks(front: Front, *tasks: str) -> Front:
    """The front as if its sequences were of these tasks, of which the first keeps least and the last everything."""

    def measured(item: Point | Baseline) -> dict[str, Any]:
        kept = {task: i / max(len(tasks) - 1, 1) for i, task in enumerate(tasks)}
        by_task = {
            task: {"kept_fraction": fraction, "by_head": [[fraction] * HEADS for _ in item.policy.layers]}
            for task, fraction in kept.items()
        }
        return item.measured | {"kept_by_task": by_task}

    def changed(items: Sequence[Baseline]) -> tuple[Baseline, ...]:
        return tuple(replace(item, measured=measured(item)) for item in items)

    points = tuple(replace(point, measured=measured(point)) for point in front.points)
    families = tuple(replace(family, members=changed(family.members)) for family in front.families)
    return replace(front, points=points, baselines=changed(front.baselines), families=families)


def read_log(run: Run) -> list[dict[str, Any]]:
    """Records of a run's log in order."""
    return [json.loads(line) for line in run.log_file.read_text().splitlines()]


def searched(folder: Path, config: SearchConfig, kinds: Sequence[Op] = ROUTED) -> PolicyStudy:
    """The study of a synthetic search that has made its trials."""
    study = open_policy_study(folder / "study.db", "first", config, problem(config, kinds), 0, {"model": "m"})
    study.run(synthetic)
    return study


def compared(front: Front, study: PolicyStudy, route_noise: float = 0.0) -> Front:
    """The front with three of its points beside their controls, two with hindsight."""
    asked = study.problem
    family = [RoutingPolicy.all_delta(asked.kinds, CHUNK), RoutingPolicy.all_softmax(asked.kinds, CHUNK)]
    comparer = Comparer(synthetic_counts, asked.costs.shapes, family, Rules(0, 5, route_noise))
    knee = next((i for i, point in enumerate(front.points) if point.id == front.knee), None)
    chosen = chosen_points([point.measured["kept_fraction"] for point in front.points], knee, 3, 2)
    found = [comparer.compare(front.points[i].id, front.points[i].policy, more) for i, more in chosen.items()]
    return replace(front, comparisons=tuple(item for item in found if item is not None))


def built(study: PolicyStudy, name: str = "first") -> Front:
    """The front of a study, with its baselines."""
    asked, config = study.problem, replace(study.config, random_draws=3)
    scorer = Scorer(synthetic_judge(), asked, config, 0, study.records)
    fixed = baselines(asked.kinds, asked.chunk_size, config.uniform_budgets, config.space)
    sweep = Sweep(asked.kinds, asked.chunk_size, asked.heads, config.space, tuple(config.uniform_budgets))
    swept = [scorer.sweep(family, members, lambda _: None) for family, members in listed(sweep)]
    points, others, families = score(scorer, study.front(), fixed, swept, lambda _: None)
    scale = scorer.scale()
    knee = scale.knee([point.search_values for point in points])
    volume = Volume(scale)
    history = tuple(volume.add(record.result) for record in study.records)
    facts = {"counts": {"trials": len(study.records)}, "commands": ["python -m search name=first"]}
    chosen = None if knee is None else points[knee].id
    return Front(
        run=name,
        objectives=scorer.names,
        points=points,
        baselines=others,
        knee=chosen,
        hypervolume=volume.now,
        history=history,
        fingerprint=study.fingerprint,
        facts=facts,
        families=families,
        hypervolume_test=scale.hypervolume([point.values for point in points]),
        knee_choice=None if knee is None else knee_choice(points, knee, scale),
    )


def is_png(data: bytes) -> bool:
    """Whether these are the bytes of a picture with something in it."""
    return data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) > 10_000
