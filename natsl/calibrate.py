"""Calibration: measuring the margins of a supernet on held-out text, for the table that turns budgets into thresholds.

Shapes: B batch, T tokens, M chunks (over all sequences), R routing heads, P points of the table.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from natsl import __version__, checkpoint
from natsl.config import CalibrationScope, RouteGradient, SupernetConfig, check_chunks
from natsl.data import Split, TaskData
from natsl.errors import UserError
from natsl.files import write_json
from natsl.heldout import HeldOut, held_out
from natsl.kernels.routing import quantile_table
from natsl.load import Choice, calibration_path
from natsl.model import RoutedLM
from natsl.run import Run
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from natsl.supernet import seed_of
from natsl.tasks import CalibrationDataConfig

# The budgets under which margins are measured. What a layer sees, and so its margins, depends on how much the layers
# before it keep: a threshold holds only where they keep what they kept when it was measured.
BUDGETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.55, 0.8)
# A forward pass has at most so many tokens, or this many sequences.
PASS_TOKENS = 32768
PASS_ROWS = 8


@torch.no_grad()
def calibrate(model: RoutedLM, data: TaskData, config: SupernetConfig, seed: int) -> None:
    """Fill the model's calibration table from held-out text of the part for the search, tasks by weight.

    Under each of ``BUDGETS``, the same in every layer, the exact quantiles of a pass are its thresholds, once pooled
    over the heads of a layer and once per head, and the margins of complete chunks are collected. The table blends the
    quantiles of the nearest two budgets, so that a uniform budget keeps what it says on these sequences. No noise is
    put on the routes. Where many chunks have exactly the margin of a threshold, as repeated text gives them, none of
    them is kept. Raises ``ValueError`` if sequences are shorter than a chunk.
    """
    if Op.routed not in model.kinds:
        return
    check_chunks(model.config.chunk_size, data.config.seq_len)
    tokens = mixed_sequences(data, config.calibration_sequences, seed_of("calibration", seed))
    at_once = max(PASS_ROWS, PASS_TOKENS // tokens.shape[1])
    passes = tokens.to(model.embed.weight.device).tensor_split(-(-len(tokens) // at_once))  # of even sizes
    exact = RouteGradient(route_noise=0.0, calibration=CalibrationScope.layer)
    table = model.calibration
    for scope in CalibrationScope:
        pools = [_margins(model, passes, budget, scope, exact) for budget in BUDGETS]
        for i, kind in enumerate(model.kinds):
            if kind is not Op.routed:
                continue
            margins = [pool[i] for pool in pools]
            if scope is CalibrationScope.layer:
                table.by_layer[i] = blend([m.reshape(-1, 1) for m in margins], BUDGETS, table.levels)[:, 0]
            else:
                table.by_head[i] = blend(margins, BUDGETS, table.levels).T
    table.set_scope(config.calibration)


def mixed_sequences(data: TaskData, count: int, seed: int) -> Tensor:
    """About ``count`` sequences [B,T] of the part for the search, tasks by weight (each at least once) and well mixed.

    Any consecutive ones hold the tasks in about the same shares.
    """
    weights = data.config.tasks
    total = sum(weights[name] for name in data.tasks)
    rows: list[tuple[float, Tensor]] = []
    for name in data.tasks:
        share = max(1, round(count * weights[name] / total))
        tokens = data.batch(name, Split.search, share, seed=seed).tokens
        rows += [((i + 0.5) / share, row) for i, row in enumerate(tokens)]
    return torch.stack([row for _, row in sorted(rows, key=lambda item: item[0])])


def _margins(
    model: RoutedLM, passes: Sequence[Tensor], budget: float, scope: CalibrationScope, exact: RouteGradient
) -> list[Tensor]:
    """Margins of the complete chunks of every layer [M,R] (layers without a router: empty) under a uniform budget."""
    chunk, heads = model.config.chunk_size, model.config.heads
    layer = LayerPolicy(budget=budget if scope is CalibrationScope.layer else (budget,) * heads)
    policy = RoutingPolicy.fill(model.kinds, chunk, layer)
    pools: list[list[Tensor]] = [[] for _ in model.kinds]
    for tokens in passes:
        layers = model(tokens, policy, route_gradient=exact, logits_to_keep=0).layers
        for pool, routing in zip(pools, layers, strict=True):
            if routing.margins is not None:
                pool.append(routing.margins[:, : tokens.shape[1] // chunk].flatten(0, 1))
    return [torch.cat(pool) if pool else torch.empty(0, heads) for pool in pools]


@torch.no_grad()
def kept_by_head(model: RoutedLM, tokens: Tensor, policy: RoutingPolicy) -> list[list[float]]:
    """The share of the complete chunks of sequences [B,T] that each layer and routing head keeps, also in training.

    Budgets are exact quantiles of these sequences, so that no calibration is needed; pooled over the heads of a layer,
    one head may keep more than another.
    """
    exact = RouteGradient(route_noise=0.0, calibration=CalibrationScope.layer)
    chunks, trains = tokens.shape[1] // model.config.chunk_size, model.training
    model.eval()
    try:
        layers = model(tokens, policy, route_gradient=exact, logits_to_keep=0).layers
        return [layer.route[:, :chunks].float().mean((0, 1)).tolist() for layer in layers]
    finally:
        model.train(trains)


def blend(pools: Sequence[Tensor], budgets: Sequence[float], levels: Tensor) -> Tensor:
    """Quantiles [P,R] at ``levels`` [P] of margins that were measured under ascending ``budgets``, one pool [M,R] each.

    Between two budgets the quantiles of their pools are weighted by the logarithm of the budget; beyond the first and
    the last those of the nearest pool are taken. They never fall from level to level, so that budgets stay nested.
    """
    tables = torch.stack([quantile_table(pool, levels) for pool in pools])  # [K,P,R]
    marks = torch.tensor(budgets, dtype=torch.float64, device=levels.device).log()
    place = (1.0 - levels).clamp(budgets[0], budgets[-1]).log()
    upper = torch.searchsorted(marks, place).clamp(1, len(budgets) - 1)
    weight = ((place - marks[upper - 1]) / (marks[upper] - marks[upper - 1]))[:, None]
    point = torch.arange(len(levels), device=levels.device)
    return torch.lerp(tables[upper - 1, point], tables[upper, point], weight).cummax(0).values


@dataclass(frozen=True)
class MadeTable:
    """A calibration table that was stored: its file, the model that has it now, and the text it was made on."""

    path: Path
    model: RoutedLM
    held: HeldOut


def make_table(
    run: Run,
    name: str,
    text: CalibrationDataConfig,
    device: torch.device,
    *,
    sequences: int | None = None,
    seed: int | None = None,
    allow_other_data: bool = False,
    overwrite: bool = False,
) -> MadeTable:
    """Calibrate the supernet of a run on other text and store the table as ``calibrations/<name>.json`` of the run.

    ``sequences`` and ``seed``: None for those of training.
    ``UserError`` for a table that exists, a supernet that is not trained to its end, and text that is not the run's
    (``natsl.heldout``).
    """
    path = calibration_path(run, name, "name")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists: choose another name or give overwrite=true")
    model, record = checkpoint.load_model(run.supernet)
    if Op.routed not in model.kinds:
        raise UserError(f"the model of run {run.name!r} has no routed layer: there is nothing to calibrate")
    if not record.get("finished"):
        raise UserError(f"the supernet of run {run.name!r} is not trained to its end: resume that run first")
    try:
        supernet = SupernetConfig(**record["supernet"])
        seed = int(record["seed"]) if seed is None else seed
    except (KeyError, TypeError):
        raise UserError(f"the checkpoint in {run.supernet} does not say how it was trained") from None
    if sequences is not None:
        supernet = replace(supernet, calibration_sequences=sequences)
    choice = Choice(run=run.name, root=str(run.path.parent))
    held = held_out(choice, text, model.config.vocab_size, allow_other_data, text.tasks, scored=False)
    calibrate(model.to(device), held.data, supernet, seed)
    made: dict[str, Any] = {
        "natsl": __version__,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "checkpoint": {"step": record.get("step"), "sha256": record.get("sha256")},
        "data": {
            "fingerprint": held.data.fingerprint,
            "text": held.data.corpus.description,
            "other_data": held.other,
            "settings": held.data.config,
        },
        "sequences": supernet.calibration_sequences,
        "seed": seed,
        **model.calibration.to_plain(),
    }
    path.parent.mkdir(exist_ok=True)
    write_json(path, made)
    return MadeTable(path, model, held)
