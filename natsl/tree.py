"""Many policies for the same sequences: layers that several of them begin with are computed once.

Shapes: L layers, S sequences, G policies, P distinct beginnings of a layer (the policies up to and including it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from natsl.compiled import CompiledLayer, CompiledPolicy, Fit, layer_plan, tensor_names
from natsl.router import LayerRouting
from natsl.space.policy import RoutingPolicy


@dataclass(frozen=True)
class _Level:
    """One layer of the tree: ``compiled`` for its P·S rows.

    ``parents`` int64 [P·S]: rows of the layer before that these read (None: the same rows). ``rows`` int64 [G·S]: which
    of them the sequences of every policy are (None: all, in this order).
    """

    compiled: CompiledLayer
    parents: Tensor | None
    rows: Tensor | None


@dataclass(frozen=True)
class PolicyTree:
    """G distinct policies for the same S sequences, made by ``RoutedLM.compile_tree``.

    ``forward`` takes the tokens of the S sequences; what it returns has G·S rows, those of the first policy first.
    """

    levels: tuple[_Level, ...]
    policies: int
    sequences: int
    fit: Fit

    def layer(self, i: int) -> CompiledLayer:
        """The policies of the rows of layer ``i``."""
        return self.levels[i].compiled

    def branch(self, i: int, x: Tensor) -> Tensor:
        """The input of layer ``i``, [P·S,T,D], from what the layer before gave."""
        parents = self.levels[i].parents
        return x if parents is None else x.index_select(0, parents)

    def expand(self, i: int, routing: LayerRouting) -> LayerRouting:
        """What the router of layer ``i`` did for the sequences of every policy, [G·S,…]."""
        rows = self.levels[i].rows
        if rows is None:
            return routing
        margins = None if routing.margins is None else routing.margins[rows]
        return LayerRouting(margins, routing.route[rows], routing.skip[rows])


def common_order(policy: RoutingPolicy) -> list[str]:
    """The key that sorts policies so that those with the same first layers are together."""
    return [str(layer.to_dict()) for layer in policy.layers]


def compile_tree(policies: Sequence[RoutingPolicy], compiled: CompiledPolicy, sequences: int) -> PolicyTree:
    """The tree of distinct policies, from these compiled for one row each."""
    device, G = compiled.threshold.device, len(policies)
    sequence = torch.arange(sequences)

    def rows(index: Sequence[int], size: int) -> Tensor | None:
        if list(index) == list(range(size)):
            return None
        wanted = torch.tensor(index)[:, None] * sequences + sequence
        return wanted.flatten().to(device, non_blocking=True)

    levels = []
    before, count = [0] * G, 1  # of each policy which beginning it has
    for i, kind in enumerate(compiled.fit.kinds):
        beginnings: dict[object, int] = {}
        own = [beginnings.setdefault(policy.layers[: i + 1], len(beginnings)) for policy in policies]
        first = [own.index(p) for p in range(len(beginnings))]
        index = torch.tensor(first).repeat_interleave(sequences).to(device, non_blocking=True)
        tensors = {name: getattr(compiled, name)[i].index_select(0, index) for name in tensor_names()}
        plan = layer_plan([policies[j].layers[i] for j in first], kind, len(first) * sequences)
        parents = rows([before[j] for j in first], count)
        levels.append(_Level(CompiledLayer(**tensors, plan=plan), parents, rows(own, len(first))))
        before, count = own, len(first)
    if count < G:
        raise ValueError(f"the tree has {G} policies, of which only {count} differ: give each once")
    return PolicyTree(tuple(levels), G, sequences, compiled.fit)
