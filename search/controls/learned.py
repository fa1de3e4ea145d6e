"""What the router of a policy did on held-out sequences, which controls are made from.

Shapes: B sequences, N chunks, R routing heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from natsl.counts import Counts
from natsl.evaluate import Routing, run_batches
from natsl.model import RoutedLM
from natsl.modules import precise
from natsl.router import LayerRouting, RoutePair
from natsl.space.policy import Op, RoutingPolicy
from natsl.tasks.sequences import Batch


@dataclass(frozen=True, eq=False)
class Subject:
    """What is evaluated: a model on sequences of every task, so many at a time."""

    model: RoutedLM
    sets: Mapping[str, Batch]
    batch_size: int


@dataclass(frozen=True, eq=False)
class Learned:
    """One pass of a policy over all sequences.

    ``routes``: task → per layer bool [B,N,R] where the policy routes, and None where it does not; on the CPU. A last
    chunk that is incomplete has route 0. ``margins``: likewise what the routers made them of.
    """

    policy: RoutingPolicy
    counts: Mapping[str, Counts]
    routes: Mapping[str, list[Tensor | None]]
    margins: Mapping[str, list[Tensor | None]]

    def change(self, rule: Callable[[Tensor, Tensor], Tensor | RoutePair]) -> Routing:
        """Routing by a rule for the routes and margins [B,N,R] of some sequences."""
        return lambda task, rows: [
            None if route is None or margins is None else rule(route[rows].float(), margins[rows])
            for route, margins in zip(self.routes[task], self.margins[task], strict=True)
        ]


def follow(subject: Subject, policy: RoutingPolicy) -> Learned:
    """Run a policy over all sequences and record what its routers do; ``FloatingPointError`` as ``count``."""
    chunk = subject.model.config.chunk_size
    counts: dict[str, list[Counts]] = {task: [] for task in subject.sets}
    routes: dict[str, list[list[Tensor]]] = {task: [] for task in subject.sets}
    margins: dict[str, list[list[Tensor]]] = {task: [] for task in subject.sets}
    routed = [i for i, layer in enumerate(policy.layers) if layer.op is Op.routed]
    for task, part, output in run_batches(subject.model, policy, subject.sets, batch_size=subject.batch_size):
        counts[task].append(Counts.of(part, output, chunk))
        complete = part.tokens.shape[1] // chunk
        kept = [output.layers[i].route.bool().cpu() for i in routed]
        for route in kept:
            route[:, complete:] = False
        routes[task].append(kept)
        margins[task].append([_margins_of(output.layers[i]).cpu() for i in routed])

    def by_layer(parts: Sequence[Sequence[Tensor]]) -> list[Tensor | None]:
        found = dict(zip(routed, (torch.cat(layer) for layer in zip(*parts, strict=True)), strict=True))
        return [found.get(i) for i in range(len(policy.layers))]

    return Learned(
        policy,
        {task: Counts.cat(parts) for task, parts in counts.items()},
        {task: by_layer(parts) for task, parts in routes.items()},
        {task: by_layer(parts) for task, parts in margins.items()},
    )


def _margins_of(layer: LayerRouting) -> Tensor:
    """The margins of a layer that routes, at least float32 [B,N,R]."""
    assert layer.margins is not None, "a layer that routes has a router"
    return precise(layer.margins)


def in_batches(
    model: RoutedLM, batch: Batch, size: int, routes: Sequence[Tensor | None]
) -> Iterator[tuple[Batch, list[Tensor | None]]]:
    """Sequences with their routes [B,N,R], ``size`` at a time, on the model's device."""
    device = model.embed.weight.device
    for first in range(0, len(batch), size):
        rows = slice(first, first + size)
        yield batch.rows(rows).to(device), [None if route is None else route[rows].to(device) for route in routes]
