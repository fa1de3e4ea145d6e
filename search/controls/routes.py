"""Controls that keep as many chunks as a learned router in every task, layer and head, and choose others.

Shapes: B sequences, N chunks, R routing heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from natsl.evaluate import Routing
from natsl.router import RoutePair
from natsl.search.controls.learned import Learned, Subject

Scores: TypeAlias = Mapping[str, list[Tensor | None]]  # task → per layer [B,N,R], None where nothing is routed


def shuffled(subject: Subject, learned: Learned, draw: int) -> Routing:
    """The routes of all layers from sequence (i + draw) mod n of the same task; ``draw`` is no multiple of n."""
    moved = {
        task: [None if route is None else route.roll(-draw, 0).float() for route in routes]
        for task, routes in learned.routes.items()
    }
    return lambda task, rows: [None if route is None else route[rows] for route in moved[task]]


def random_heads(subject: Subject, learned: Learned, draw: int) -> Routing:
    """Random chunks, as many in each task, layer and head as the learned router keeps; ``draw`` is the seed."""
    generator = torch.Generator().manual_seed(draw)
    drawn = {
        task: [None if route is None else _redrawn(route, learned.counts[task].chunks, generator) for route in routes]
        for task, routes in learned.routes.items()
    }
    return lambda task, rows: [None if route is None else route[rows] for route in drawn[task]]


def _redrawn(route: Tensor, complete: int, generator: torch.Generator) -> Tensor:
    """As many random complete chunks of all sequences, head by head."""
    B, N, R = route.shape
    rank = torch.rand(B * complete, R, generator=generator, dtype=torch.float64).argsort(0).argsort(0)
    keep = (rank < route.sum((0, 1))).float().view(B, complete, R)
    return F.pad(keep, (0, 0, 0, N - complete))


def window(subject: Subject, learned: Learned, draw: int) -> Routing:
    """A query of chunk c sees the K latest complete chunks, K as many as the router had kept; all are written."""
    return learned.change(lambda route, _: RoutePair(route, torch.zeros_like(route), seen(route, sink=False)))


def sink_window(subject: Subject, learned: Learned, draw: int) -> Routing:
    """As ``window``, with the first chunk in place of the oldest one."""
    return learned.change(lambda route, _: RoutePair(route, torch.zeros_like(route), seen(route, sink=True)))


def half_window(subject: Subject, learned: Learned, draw: int) -> Routing:
    """As ``window``, but the older half of the chunks seen are those with the highest margins of all that are older.

    Where K has grown, some of these may be chunks that a memory of K chunks would have let go before.
    """
    return learned.change(lambda route, margins: RoutePair(route, torch.zeros_like(route), half_seen(route, margins)))


def fixed_window(subject: Subject, learned: Learned, draw: int) -> Routing:
    """A query sees the K latest complete chunks, K as many as the router keeps in the end; all are written.

    Where ``window`` grows with what the router has kept by then, this one has its size from the start: the memory that
    a sequence needs in the end is the same, and used all the time.
    """
    return _fixed(learned, learned.margins, latest=lambda size: size)


def fixed_half(subject: Subject, learned: Learned, draw: int) -> Routing:
    """As ``fixed_window``, but only half of the K (rounded up) are the latest; where a chunk has to go it is the one of
    the others with the lowest margin, in the router's own pass. What has gone does not come back.
    """
    return _fixed(learned, learned.margins, latest=lambda size: (size + 1) // 2)


def fixed_half_random(subject: Subject, learned: Learned, draw: int) -> Routing:
    """As ``fixed_half``, by random scores, so that the older half is a uniform sample; ``draw`` is the seed."""
    return _fixed(learned, _random_scores(learned, draw), latest=lambda size: (size + 1) // 2)


def _random_scores(learned: Learned, draw: int) -> Scores:
    generator = torch.Generator().manual_seed(draw)
    return {
        task: [None if route is None else torch.rand(route.shape, generator=generator) for route in routes]
        for task, routes in learned.routes.items()
    }


def _fixed(learned: Learned, scores: Scores, latest: Callable[[Tensor], Tensor]) -> Routing:
    """Chunks are held by ``held``, as many in each head as the router keeps in all sequences of the task together."""
    sizes = {
        task: [None if route is None else _spread(route.sum((0, 1)), len(route)) for route in routes]
        for task, routes in learned.routes.items()
    }

    def routing(task: str, rows: slice) -> list[RoutePair | None]:
        pairs: list[RoutePair | None] = []
        for route, size, score in zip(learned.routes[task], sizes[task], scores[task], strict=True):
            if route is None or size is None or score is None:
                pairs.append(None)
                continue
            visible = held(size[rows], latest(size[rows]), score[rows])
            pairs.append(RoutePair(route[rows].float(), torch.zeros(route[rows].shape), visible))
        return pairs

    return routing


def _spread(total: Tensor, parts: int) -> Tensor:
    """Numbers as equal as can be with the sum ``total`` [R]: [parts,R]."""
    return total // parts + (torch.arange(parts)[:, None] < total % parts)


def held(size: Tensor, latest: Tensor, score: Tensor) -> Tensor:
    """Which chunks a memory of ``size`` [B,R] chunks shows to each chunk, of scores [B,N,R]: bool [B,N,N,R].

    Every complete chunk enters. If there is one too many, that of the lowest (finite) score goes for good, but none of
    the ``latest`` [B,R].
    """
    chunk = torch.arange(score.shape[1])[:, None]
    now, shown = torch.zeros(score.shape, dtype=torch.bool), []
    for n in range(score.shape[1]):
        shown.append(now)
        now = now | (chunk == n)
        free = now & (n - chunk >= latest[:, None])
        lowest = score.masked_fill(~free, math.inf).argmin(1, keepdim=True)
        now = now & ~((chunk == lowest) & (now.sum(1, keepdim=True) > size[:, None]))
    return torch.stack(shown, 1)


def seen(route: Tensor, sink: bool) -> Tensor:
    """Which chunks a window shows to each chunk, of the size of what a head has kept before: bool [B,N,N,R]."""
    size, age = _size_and_age(route)
    if not sink:
        return (age >= 1) & (age <= size)
    first = (torch.arange(route.shape[1], device=route.device) == 0)[None, None, :, None]
    return (age >= 1) & ((age < size) | (first & (size > 0)))


def half_seen(route: Tensor, margins: Tensor) -> Tensor:
    """As ``seen``: the latest half (rounded up), and of the older chunks those with the highest margins [B,N,R]."""
    size, age = _size_and_age(route)
    score = margins[:, None].masked_fill(age <= (size / 2).ceil(), math.inf).masked_fill(age < 1, -math.inf)
    return score.argsort(dim=2, descending=True, stable=True).argsort(2) < size


def _size_and_age(route: Tensor) -> tuple[Tensor, Tensor]:
    """How many chunks a head has kept before each chunk [B,N,1,R], and the age of every chunk then [1,N,N,1].

    The third axis is the chunk of the key, the second that of the query: 1 is the latest complete one.
    """
    chunk = torch.arange(route.shape[1], device=route.device)
    return (route.cumsum(1) - route)[:, :, None], (chunk[:, None] - chunk)[None, :, :, None]


def drop(subject: Subject, learned: Learned, draw: int) -> Routing:
    """The learned routes, but a chunk that is not kept is not written to the state either."""
    return learned.change(lambda route, _: RoutePair(route, torch.ones_like(route)))


def keep_and_write(subject: Subject, learned: Learned, draw: int) -> Routing:
    """The learned routes, but a chunk that is kept is written to the state as well."""
    return learned.change(lambda route, _: RoutePair(route, torch.zeros_like(route)))


def oracle(subject: Subject, learned: Learned, draw: int) -> Routing:
    """The chunks that hold the answers, in every head in which the learned router keeps any; another cost."""
    size = learned.policy.chunk_size
    relevant = {task: batch.relevant_chunks(size)[:, :, None].float() for task, batch in subject.sets.items()}

    def routing(task: str, rows: slice) -> list[Tensor | None]:
        return [
            None if route is None else relevant[task][rows] * route.any(1).any(0).float()
            for route in learned.routes[task]
        ]

    return routing
