"""Training one set of weights under many policies: the sandwich, its loss, calibration of budgets.

Shapes: B batch, T tokens, N chunks, R routing heads, P table points.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from natsl.config import CalibrationScope, Sandwich, SupernetConfig, check_chunks
from natsl.data import Split, TaskData
from natsl.kernels.routing import quantile_table
from natsl.model import RoutedLM, TokenLosses
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from natsl.tasks.sequences import IGNORED, Batch

# Share of the routed layers that a random policy makes delta-only, so that searched policies that mix ops are trained.
DELTA_SHARE = 0.25
CALIBRATION_POLICIES = 8
# Tokens of a pass of calibration: as many policies as have room, but at least eight sequences of one.
CALIBRATION_TOKENS = 32768
CALIBRATION_ROWS = 8

N = TypeVar("N")  # a number: 0-dim tensor or float


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any parts: neighbouring seeds and steps have nothing in common, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def split_budget(total: float, shares: Sequence[float]) -> list[float]:
    """Budgets proportional to ``shares`` but at most 1 each, whose mean is ``total`` in [0, 1] (water filling)."""
    budgets = [0.0] * len(shares)
    open_layers = sorted(range(len(shares)), key=lambda i: -shares[i])
    rest = total * len(shares)
    for position, i in enumerate(open_layers):
        weight = sum(shares[j] for j in open_layers[position:])
        budgets[i] = min(1.0, rest * shares[i] / weight) if weight > 0 else rest / (len(shares) - position)
        rest = max(0.0, rest - budgets[i])  # rounding must not make it negative
    return budgets


def random_policy(kinds: Sequence[Op], chunk_size: int, low: float, high: float, rng: random.Random) -> RoutingPolicy:
    """A policy whose budget, averaged over all layers with a router, is uniform in [low, high] and split at random."""
    routed = [i for i, kind in enumerate(kinds) if kind is Op.routed]
    total = rng.uniform(low, high) * len(routed)  # in fully kept layers: at least so many must stay routed
    shuffled = rng.sample(routed, len(routed))
    active = [i for n, i in enumerate(shuffled) if n < max(total, 1) or rng.random() >= DELTA_SHARE]
    budgets = split_budget(total / max(1, len(active)), [rng.expovariate(1.0) for _ in active])
    layers = [LayerPolicy(Op.delta if kind is Op.routed else kind) for kind in kinds]
    for i, budget in zip(active, budgets, strict=True):
        layers[i] = LayerPolicy(Op.routed, budget=budget)
    return RoutingPolicy(tuple(layers), chunk_size)


def sandwich_policies(model: RoutedLM, config: SupernetConfig, seed: int, step: int) -> list[RoutingPolicy]:
    """The policies of one step: largest, smallest and random ones, determined by (seed, step) on every rank."""
    kinds, chunk = model.kinds, model.config.chunk_size
    largest = RoutingPolicy.all_softmax(kinds, chunk)
    if step < config.dense_steps:
        return [largest]
    low = config.budget_min
    if config.anneal_steps > 0:
        done = min(1.0, (step - config.dense_steps) / config.anneal_steps)
        low = config.budget_max - done * (config.budget_max - config.budget_min)
    rng = random.Random(seed_of("sandwich", seed, step))
    middle = [random_policy(kinds, chunk, low, config.budget_max, rng) for _ in range(config.random_policies)]
    return [largest, RoutingPolicy.all_delta(kinds, chunk), *middle]


@dataclass(frozen=True)
class Loss(Generic[N]):
    """Loss of one policy: ``total`` = text + recall, means over scored positions (nats); ``accuracy`` of recall.

    0-dim tensors, or floats once they are on the host. NaN in ``text``, ``recall`` and ``accuracy`` where nothing of
    the kind is scored.
    """

    total: N
    text: N
    recall: N
    accuracy: N


def task_loss(tokens: TokenLosses, batch: Batch) -> Loss[Tensor]:
    """Mean loss over scored text plus mean loss over recall answers; ``tokens`` are the losses of the batch."""
    text = (batch.targets != IGNORED) & ~batch.recall
    parts, values = [], []
    for mask in (text, batch.recall):
        count = mask.sum()
        mean = (tokens.loss * mask).sum() / count.clamp(min=1)
        parts.append(mean)  # 0 where nothing is scored
        values.append(mean.detach().masked_fill(count == 0, math.nan))
    accuracy = (tokens.right & batch.recall).sum() / batch.recall.sum()  # 0 / 0 = NaN
    return Loss(total=torch.stack(parts).sum(), text=values[0], recall=values[1], accuracy=accuracy)


def sandwich_backward(
    model: RoutedLM, batch: Batch, policies: Sequence[RoutingPolicy], config: SupernetConfig
) -> list[Loss[Tensor]]:
    """Accumulate the gradient of the mean loss over the policies; returns each policy's loss, in their order.

    ``groups``: every policy on its own equal slice of the batch, in one pass. ``accumulate``: every policy on the whole
    batch, one pass each, with in-place distillation from the first (largest) policy if ``distill`` > 0.
    """
    if config.sandwich is Sandwich.groups:
        size = len(batch) // len(policies)
        tokens = model.token_losses(batch.tokens, policies, batch.targets, config)
        slices = [slice(i * size, (i + 1) * size) for i in range(len(policies))]
        losses = [task_loss(TokenLosses(tokens.loss[rows], tokens.right[rows]), batch.rows(rows)) for rows in slices]
        (torch.stack([loss.total for loss in losses]).mean()).backward()
        return losses
    losses = []
    teacher: Tensor | None = None
    scored = batch.targets != IGNORED
    for policy in policies:
        if config.distill == 0:
            loss = task_loss(model.token_losses(batch.tokens, policy, batch.targets, config), batch)
            total = loss.total
        else:
            logits = model(batch.tokens, policy, training=config).logits
            loss = task_loss(losses_of(logits, batch.targets), batch)
            total = loss.total
            odds = F.log_softmax(logits, -1)
            if teacher is None:
                teacher = odds.detach()
            else:
                divergence = F.kl_div(odds, teacher, reduction="none", log_target=True).sum(-1)
                total = total + config.distill * ((divergence * scored).sum() / scored.sum())
        (total / len(policies)).backward()
        losses.append(loss)
    return losses


def losses_of(logits: Tensor, targets: Tensor) -> TokenLosses:
    """Losses per token from logits [B,T,V] that had to be computed anyway."""
    ce = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return TokenLosses(ce.view_as(targets), logits.detach().argmax(-1) == targets)


@torch.no_grad()
def calibrate(model: RoutedLM, data: TaskData, config: SupernetConfig, seed: int) -> None:
    """Fill the model's calibration table from held-out text, under a mix of random policies.

    The margins of a layer depend on what earlier layers kept: they are pooled over policies as varied as in training,
    each with the exact quantiles of its slice as thresholds, over complete chunks (and over heads in ``layer``
    scope). A slice that is too large for one pass is cut into parts, each with quantiles of its own. Raises
    ``ValueError`` if sequences are shorter than a chunk.
    """
    device = model.embed.weight.device
    rng = random.Random(seed_of("calibration", seed))
    kinds, chunk = model.kinds, model.config.chunk_size
    if Op.routed not in kinds:
        return
    check_chunks(chunk, data.config.seq_len)
    policies = [
        random_policy(kinds, chunk, config.budget_min, config.budget_max, rng) for _ in range(CALIBRATION_POLICIES)
    ]
    pooled: list[list[Tensor]] = [[] for _ in kinds]
    weights = data.config.tasks
    total = sum(weights[name] for name in data.tasks)
    for name in data.tasks:
        share = config.calibration_sequences * weights[name] / total / len(policies)
        rows = max(1, round(share))
        tokens = data.batch(name, Split.search, rows * len(policies), seed=1).tokens
        T = tokens.shape[1]
        at_once = max(1, CALIBRATION_TOKENS // (rows * T))
        for first in range(0, len(policies), at_once):
            group = policies[first : first + at_once]
            block = tokens[first * rows : (first + len(group)) * rows]
            parts = block.split(max(CALIBRATION_ROWS, CALIBRATION_TOKENS // T)) if len(group) == 1 else [block]
            for part in parts:
                for i, layer in enumerate(model.routing(part.to(device), group, training=config)):
                    if layer.margins is not None:
                        pooled[i].append(layer.margins[:, : T // chunk].flatten(0, 1))
    for i, pool in enumerate(pooled):
        if not pool:
            continue
        margins = torch.cat(pool)  # [M,R]
        if config.calibration is CalibrationScope.layer:
            margins = margins.reshape(-1, 1)
        levels = torch.linspace(0.0, 1.0, model.calibration.shape[2], dtype=torch.float64, device=margins.device)
        table = quantile_table(margins, levels)  # [P,R], or [P,1] for all heads
        model.calibration[i] = table.T.to(model.calibration)
