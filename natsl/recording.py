"""What a cache remembers of the tokens that it may have to take back: a state to begin again from, and what came since.

A delta state has no way back, so ``Cache.crop`` restores the state and reads the tokens again that are to stay. Shapes:
B sequences, T tokens of a call, N chunks that it touches, R routing heads, S tokens since the snapshot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from natsl.compiled import CompiledPolicy
from natsl.kernels.segment import closed_chunks, real_tokens, touched_chunks
from natsl.layout import Layout
from natsl.space.policy import RoutingPolicy

if TYPE_CHECKING:
    from natsl.cache import Cache, LayerCache
    from natsl.model import Policies, RoutedLM
    from natsl.router import RoutePair

_POOL = ("pages.keys", "pages.values")  # kept pages stay where they are: only the open ones are written again


class _Snapshot(NamedTuple):
    """A layer's state without its pool of pages, of which it has the open ones: keys, values [B,R,G,C,·]."""

    tensors: dict[str, Tensor]
    open_pages: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Call:
    """What a call has read: tokens [B,T], which are ``real`` bool [B,T], and which chunks it ``closed`` bool [B,N]."""

    tokens: Tensor
    real: Tensor
    closed: Tensor
    routes: list[RoutePair]
    policy: Policies | CompiledPolicy


class Recording:
    """The state of a cache at some moment, and what each call of ``forward`` has read since, with the routes."""

    def __init__(self, cache: Cache) -> None:
        self.lengths = cache.lengths.clone()  # all are copies: single steps may write in place
        self._layers = [_snapshot(layer) for layer in cache.layers]
        self._chunk_size = cache.config.chunk_size
        self._calls: list[_Call] = []

    def add(
        self,
        tokens: Tensor,
        lengths: Tensor | None,
        read: Tensor,
        policy: Policies | CompiledPolicy,
        routes: list[RoutePair],
    ) -> None:
        """A call has read ``tokens`` [B,T], padding on the right, after ``read`` [B] others, and made these routes.

        ``lengths`` [B]: real tokens of each row (None: all).
        """
        T = tokens.shape[1]
        real = torch.ones_like(tokens, dtype=torch.bool) if lengths is None else real_tokens(T, lengths)
        closed = closed_chunks(read % self._chunk_size, T, self._chunk_size, lengths)
        policy = policy if isinstance(policy, RoutingPolicy | CompiledPolicy) else tuple(policy)
        self._calls.append(_Call(tokens.clone(), real, closed, routes, policy))

    def restore(self, cache: Cache) -> None:
        """Put ``cache``, whose pages have only grown since, back to the snapshot, which is used up."""
        cache.layers = [_restored(*pair) for pair in zip(cache.layers, self._layers, strict=True)]
        cache.lengths = self.lengths

    def replay(self, cache: Cache, model: RoutedLM, lengths: Tensor) -> None:
        """Read again, from the snapshot on, until each row has ``lengths`` int64 [B]; chunks get the routes they had.

        Calls under one policy are one pass.
        """
        for calls in _under_one_policy(self._calls):
            tokens, count, routes = _joined(calls)
            count = torch.minimum(count, lengths - cache.lengths)
            T = int(count.max())
            if not T:
                continue
            N = touched_chunks(T, self._chunk_size)
            model(
                tokens[:, :T],
                calls[0].policy,
                layout=Layout(count),
                cache=cache,
                routes=[type(pair)(*(F.pad(x, (0, 0, 0, N))[:, :N] for x in pair[:2])) for pair in routes],
                logits_to_keep=0,
            )


def _snapshot(layer: LayerCache) -> _Snapshot:
    tensors = {name: x.clone() for name, x in layer.tensors().items() if name not in _POOL}
    if layer.pages is None:
        return _Snapshot(tensors, ())
    page = layer.pages.open
    return _Snapshot(tensors, (layer.pages.keys[page], layer.pages.values[page]))


def _restored(layer: LayerCache, snapshot: _Snapshot) -> LayerCache:
    # pages are given out in the order of their numbers, so that those of the snapshot are the first ones still
    layer = layer.replaced(snapshot.tensors)
    if layer.pages is not None:
        page = layer.pages.open
        for pool, x in zip((layer.pages.keys, layer.pages.values), snapshot.open_pages, strict=True):
            pool[page] = x
    return layer


def _under_one_policy(calls: Sequence[_Call]) -> list[list[_Call]]:
    """Consecutive calls whose policies are known to be the same."""
    groups: list[list[_Call]] = []
    for call in calls:
        last = groups[-1][-1].policy if groups else None
        comparable = not isinstance(last, CompiledPolicy) and not isinstance(call.policy, CompiledPolicy)
        if last is call.policy or (comparable and last == call.policy):
            groups[-1].append(call)
        else:
            groups.append([call])
    return groups


def _joined(calls: Sequence[_Call]) -> tuple[Tensor, Tensor, list[RoutePair]]:
    """The calls as one: tokens [B,S] with padding on the right, how many of each row, routes of the closed chunks."""

    def in_front(parts: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        """What the masks mark of [B,·,…], in its order."""
        place = torch.cat(list(masks), 1).long().argsort(stable=True, dim=1, descending=True)
        return torch.cat(list(parts), 1)[torch.arange(len(place), device=place.device)[:, None], place]

    real, closed = [call.real for call in calls], [call.closed for call in calls]
    routes = [
        pairs[0]._replace(
            keep=in_front([x.keep for x in pairs], closed), skip=in_front([x.skip for x in pairs], closed)
        )
        for pairs in zip(*(call.routes for call in calls), strict=True)
    ]
    return in_front([call.tokens for call in calls], real), torch.stack([x.sum(1) for x in real]).sum(0), routes
