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

from natsl.config import Sandwich, SupernetConfig
from natsl.model import RoutedLM
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from natsl.tasks.sequences import IGNORED, Batch

# Share of the routed layers that a random policy makes delta-only, so that searched policies that mix ops are trained.
DELTA_SHARE = 0.25
# Share of the random policies with a budget per head, and in them the share of heads that are drawn to keep nothing.
HEAD_SHARE = 0.25
EMPTY_SHARE = 0.5
# Share of the steps whose smallest policy runs both memories with nothing kept, as small budgets nearly do.
EMPTY_STEPS = 0.5

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


def random_head_policy(
    kinds: Sequence[Op], heads: int, chunk_size: int, low: float, high: float, rng: random.Random
) -> RoutingPolicy:
    """A policy with a budget per head, whose mean over all heads is uniform in [low, high] and split at random.

    Heads that are drawn to keep nothing have the budget 0, also all of a layer: both memories then run in it.
    """
    units = [(i, r) for i, kind in enumerate(kinds) if kind is Op.routed for r in range(heads)]
    total = rng.uniform(low, high) * len(units)  # in fully kept heads: at least so many must keep something
    shuffled = rng.sample(units, len(units))
    active = [unit for n, unit in enumerate(shuffled) if n < total or rng.random() >= EMPTY_SHARE]
    budgets = split_budget(total / max(1, len(active)), [rng.expovariate(1.0) for _ in active])
    chosen = dict(zip(active, budgets, strict=True))
    return RoutingPolicy(
        tuple(
            LayerPolicy(budget=tuple(chosen.get((i, r), 0.0) for r in range(heads)))
            if kind is Op.routed
            else LayerPolicy(kind)
            for i, kind in enumerate(kinds)
        ),
        chunk_size,
    )


def sandwich_policies(model: RoutedLM, config: SupernetConfig, seed: int, step: int) -> list[RoutingPolicy]:
    """The policies of one step: largest, smallest and random ones, determined by (seed, step) on every rank.

    Only the largest in the first ``dense_steps`` steps, and of a model without routed layers, which has no other.
    """
    kinds, chunk = model.kinds, model.config.chunk_size
    largest = RoutingPolicy.all_softmax(kinds, chunk)
    if step < config.dense_steps or Op.routed not in kinds:
        return [largest]
    low, low_head = config.budget_min, 0.0
    if step - config.dense_steps < config.anneal_steps:
        done = (step - config.dense_steps) / config.anneal_steps
        low = low_head = config.budget_max - done * (config.budget_max - config.budget_min)
    rng = random.Random(seed_of("sandwich", seed, step))
    middle = [
        random_head_policy(kinds, model.config.heads, chunk, low_head, config.budget_max, rng)
        if rng.random() < HEAD_SHARE
        else random_policy(kinds, chunk, low, config.budget_max, rng)
        for _ in range(config.random_policies)
    ]
    smallest = RoutingPolicy.all_delta(kinds, chunk)
    if smallest_is_empty(seed, step):
        smallest = RoutingPolicy.fill(kinds, chunk, LayerPolicy(budget=0.0))
    return [largest, smallest, *middle]


def smallest_is_empty(seed: int, step: int) -> bool:
    """Whether the smallest policy of a step is not delta-only but routed with nothing kept."""
    return random.Random(seed_of("smallest", seed, step)).random() < EMPTY_STEPS


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


def task_loss(loss: Tensor, right: Tensor, batch: Batch) -> Loss[Tensor]:
    """Mean loss over scored text plus mean loss over recall answers; ``loss`` and ``right`` as in ``LMOutput``."""
    text = (batch.targets != IGNORED) & ~batch.recall
    parts, values = [], []
    for mask in (text, batch.recall):
        count = mask.sum()
        mean = (loss * mask).sum() / count.clamp(min=1)
        parts.append(mean)  # 0 where nothing is scored
        values.append(mean.detach().masked_fill(count == 0, math.nan))
    accuracy = (right & batch.recall).sum() / batch.recall.sum()  # 0 / 0 = NaN
    return Loss(total=torch.stack(parts).sum(), text=values[0], recall=values[1], accuracy=accuracy)


def sandwich_backward(
    model: RoutedLM, batch: Batch, policies: Sequence[RoutingPolicy], config: SupernetConfig
) -> list[Loss[Tensor]]:
    """Accumulate the gradient of the mean loss over the policies; returns each policy's loss, in their order.

    ``groups``: every policy on its own equal slice of the batch, in one pass. ``accumulate``: every policy on the whole
    batch, one pass each, with in-place distillation from the first (largest) policy if ``distill`` > 0.
    """
    gradient = config.route_gradient()
    if config.sandwich is Sandwich.groups:
        size = len(batch) // len(policies)
        tokens = model(batch.tokens, policies, targets=batch.targets, route_gradient=gradient)
        slices = [slice(i * size, (i + 1) * size) for i in range(len(policies))]
        losses = [task_loss(tokens.loss[rows], tokens.right[rows], batch.rows(rows)) for rows in slices]
        (torch.stack([loss.total for loss in losses]).mean()).backward()
        return losses
    losses = []
    teacher: Tensor | None = None
    scored = batch.targets != IGNORED
    for policy in policies:
        if config.distill == 0:
            output = model(batch.tokens, policy, targets=batch.targets, route_gradient=gradient)
            loss = task_loss(output.loss, output.right, batch)
            total = loss.total
        else:
            logits = model(batch.tokens, policy, route_gradient=gradient).logits.float()
            loss = task_loss(*losses_of(logits, batch.targets), batch)
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


def losses_of(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """``loss`` and ``right`` as in ``LMOutput``, from logits [B,T,V] that had to be computed anyway."""
    ce = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return ce.view_as(targets), logits.detach().argmax(-1) == targets
