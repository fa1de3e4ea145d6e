"""Chunks chosen with the answers in sight: how much there is to select, by first-order gains.

Shapes: B sequences, N chunks, R routing heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from natsl.config import Counterfactual, RouteGradient
from natsl.evaluate import Routing
from natsl.model import RoutedLM
from natsl.search.controls.learned import Learned, Subject, in_batches
from natsl.space.policy import Op, RoutingPolicy
from natsl.tasks.sequences import IGNORED, Batch

ROUNDS = 4  # after each a quarter more of the chunks are taken
# What a choice costs with its evaluation, in evaluations: a backward pass takes about twice a forward pass.
PASSES = 3 * ROUNDS + 1
_SMALLER = 4  # a batch with gradients is so many times smaller
_INSERTION = RouteGradient(counterfactual=Counterfactual.insertion)


def hindsight(subject: Subject, learned: Learned, draw: int) -> Routing:
    """In each sequence, layer and head as many chunks as the router keeps, by what they gain on the scored tokens.

    The answers of a task, or its text if it has none. It sees what it is scored on, and its gains are first order: an
    estimate of what there is to select, not a bound.
    """
    return _chosen(subject, learned, by_head=True)


def hindsight_layer(subject: Subject, learned: Learned, draw: int) -> Routing:
    """As ``hindsight``, with the same count in each layer, free over its heads."""
    return _chosen(subject, learned, by_head=False)


def _chosen(subject: Subject, learned: Learned, by_head: bool) -> Routing:
    size = max(1, subject.batch_size // _SMALLER)
    routes: dict[str, list[Tensor | None]] = {}
    for task, batch in subject.sets.items():
        parts = [
            choose(subject.model, learned.policy, part, kept, by_head)
            for part, kept in in_batches(subject.model, batch, size, learned.routes[task])
        ]
        routes[task] = [None if layer[0] is None else torch.cat(layer).cpu() for layer in zip(*parts, strict=True)]
    return lambda task, rows: [None if route is None else route[rows] for route in routes[task]]


def _undecided(policy: RoutingPolicy) -> RoutingPolicy:
    """The policy with a budget that makes routes carry a gradient; they are fixed, so that it decides nothing."""
    layers = [replace(layer, budget=0.5, threshold=None) if layer.op is Op.routed else layer for layer in policy.layers]
    return replace(policy, layers=tuple(layers))


def choose(
    model: RoutedLM, policy: RoutingPolicy, batch: Batch, kept: Sequence[Tensor | None], by_head: bool
) -> list[Tensor | None]:
    """Routes [B,N,R] of 0 and 1 with as many chunks as ``kept`` has in each sequence, layer and head (or layer)."""
    chosen = [None if route is None else torch.zeros_like(route, dtype=torch.float32) for route in kept]
    if all(route is None for route in chosen):
        return chosen
    for step in range(1, ROUNDS + 1):
        gains = gains_of(model, policy, batch, chosen)
        for route, before, gain in zip(kept, chosen, gains, strict=True):
            if route is None or before is None or gain is None:
                continue
            gain[:, batch.tokens.shape[1] // policy.chunk_size :] = -math.inf
            total = _pools(route, by_head).sum(2)
            need = (total * step + ROUNDS // 2) // ROUNDS - _pools(before, by_head).sum(2).long()
            taken = take(_pools(gain.masked_fill(before > 0, -math.inf), by_head), need)
            before += taken.transpose(1, 2) if by_head else taken.view_as(before)
    return chosen


def gains_of(
    model: RoutedLM, policy: RoutingPolicy, batch: Batch, routes: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """What keeping each chunk takes off its sequence's loss under routes [B,N,R], in nats, to first order: [B,N,R].

    Of the answers where the batch has some, else of all that is scored. ``policy``: routed where there are routes.
    ``FloatingPointError`` if a gain is not finite.
    """
    scored = batch.recall if bool(batch.recall.any()) else batch.targets != IGNORED
    leaves = [None if route is None else route.to(torch.float32, copy=True).requires_grad_() for route in routes]
    with torch.enable_grad():
        undecided = _undecided(policy)
        output = model(batch.tokens, undecided, targets=batch.targets, routes=leaves, route_gradient=_INSERTION)
        assert output.loss is not None, "the model was given targets"
        loss = output.loss[scored].sum()
        gradients = iter(torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None]))
    gains = [None if leaf is None else -next(gradients) for leaf in leaves]
    if not all(gain is None or bool(gain.isfinite().all()) for gain in gains):
        raise FloatingPointError("the gains of chunks are not finite")
    return gains


def _pools(x: Tensor, by_head: bool) -> Tensor:
    """What is chosen from together, [B,pools,·]: the chunks of x [B,N,R] head by head, or of all heads."""
    return x.transpose(1, 2) if by_head else x.flatten(1)[:, None]


def take(gain: Tensor, need: Tensor) -> Tensor:
    """1 at the ``need`` [B,P] largest of gain [B,P,M], else 0, float32."""
    rank = gain.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
    return (rank < need[:, :, None]).float()
