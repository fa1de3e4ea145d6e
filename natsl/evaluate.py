"""Quality and kept fraction of a model under one policy, on held-out sequences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from natsl.counts import Counts
from natsl.model import LMOutput, RoutedLM, Routes
from natsl.space.policy import Op, RoutingPolicy
from natsl.tasks import metrics
from natsl.tasks.sequences import IGNORED, Batch
from natsl.tree import common_order


@dataclass(frozen=True)
class RandomRouting:
    """The control: layer l keeps the share ``fractions[l]`` of all complete chunks and heads, drawn at random.

    The number kept is exact: the share of the evaluated sequences as a whole, rounded.
    """

    seed: int
    fractions: tuple[float, ...]


@dataclass(frozen=True)
class Evaluation:
    """Measured values: losses in nats per token, errors as 1 − accuracy, fractions of complete chunks.

    ``bits_per_byte`` is None where the text is token ids. ``errors``: metric of every task → its error (None: the task
    was not evaluated). ``kept_fraction`` is the mean over the layers with a router; ``kept_by_layer`` has an entry per
    layer, ``kept_by_head`` one per layer and routing head. All three are over the sequences of all tasks together.
    ``kept_fraction_by_task`` and ``kept_by_task`` are ``kept_fraction`` and ``kept_by_head`` of each task's own
    sequences: one threshold serves all tasks, and need not spend its budget evenly on them. Both are empty in values
    from before they were measured.
    """

    val_loss: float | None
    bits_per_byte: float | None
    errors: Mapping[str, float | None]
    kept_fraction: float
    kept_by_layer: tuple[float, ...]
    kept_by_head: tuple[tuple[float, ...], ...]
    kept_fraction_by_task: Mapping[str, float] = field(default_factory=dict)
    kept_by_task: Mapping[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, flat: the errors stand between the losses and the fractions, each under its metric.

        ``kept_by_task``, left out if nothing is known of it, is an entry per task: ``kept_fraction`` and ``by_head``.
        """
        plain = {
            "val_loss": self.val_loss,
            "bits_per_byte": self.bits_per_byte,
            **self.errors,
            "kept_fraction": self.kept_fraction,
            "kept_by_layer": self.kept_by_layer,
            "kept_by_head": self.kept_by_head,
        }
        by_task = {
            task: {"kept_fraction": self.kept_fraction_by_task[task], "by_head": heads}
            for task, heads in self.kept_by_task.items()
        }
        return plain | ({"kept_by_task": by_task} if by_task else {})

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Evaluation:
        """The inverse of ``to_dict``, also after JSON; a task that is newer than the values has no error."""
        by_task = plain.get("kept_by_task", {})
        return cls(
            val_loss=plain["val_loss"],
            bits_per_byte=plain["bits_per_byte"],
            errors={metric: plain.get(metric) for metric in metrics().values()},
            kept_fraction=plain["kept_fraction"],
            kept_by_layer=tuple(plain["kept_by_layer"]),
            kept_by_head=_nested(plain["kept_by_head"]),
            kept_fraction_by_task={task: kept["kept_fraction"] for task, kept in by_task.items()},
            kept_by_task={task: _nested(kept["by_head"]) for task, kept in by_task.items()},
        )


def _nested(rows: Iterable[Iterable[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in rows)


Routing: TypeAlias = Callable[[str, slice], Routes]  # a task and rows of its sequences → their fixed routes


def evaluate(
    model: RoutedLM,
    policy: RoutingPolicy,
    sets: Mapping[str, Batch],
    *,
    random_routing: RandomRouting | None = None,
    batch_size: int = 32,
) -> Evaluation:
    """Score a policy on ``sets`` (task → sequences); ``val_loss`` is the mean over the text of all of them.

    Raises ``FloatingPointError`` if a result is not finite.
    """
    routing = None if random_routing is None else _random_routing(policy, random_routing, sets, model.config.heads)
    return summary(count(model, policy, sets, routing=routing, batch_size=batch_size), model.supernet_kinds)


def count(
    model: RoutedLM,
    policy: RoutingPolicy,
    sets: Mapping[str, Batch],
    *,
    routing: Routing | None = None,
    batch_size: int = 32,
) -> dict[str, Counts]:
    """What is counted of each task's sequences under a policy, or under fixed routes where ``routing`` gives some.

    Raises ``FloatingPointError`` if a result is not finite.
    """
    parts: dict[str, list[Counts]] = {task: [] for task in sets}
    for task, part, output in run_batches(model, policy, sets, routing=routing, batch_size=batch_size):
        parts[task].append(Counts.of(part, output, model.config.chunk_size))
    return {task: Counts.cat(counts) for task, counts in parts.items()}


def count_each(
    model: RoutedLM, policies: Sequence[RoutingPolicy], sets: Mapping[str, Batch], *, batch_size: int = 32
) -> list[dict[str, Counts] | None]:
    """As ``count`` of every one of distinct policies, several in each pass (None: its results are not finite).

    Layers that policies begin with are computed once for those that share them. ``batch_size``: rows of a pass, one for
    each policy and sequence.
    """
    device, G = model.embed.weight.device, len(policies)
    order = sorted(range(G), key=lambda i: common_order(policies[i]))
    parts: list[dict[str, list[Counts]]] = [{task: [] for task in sets} for _ in policies]
    broken: set[int] = set()
    model.eval()
    for group in (order[first : first + batch_size] for first in range(0, G, batch_size)):
        size, trees = max(1, batch_size // len(group)), {}  # by the number of sequences
        for task, batch in sets.items():
            for first in range(0, len(batch), size):
                part = batch.rows(slice(first, first + size)).to(device)
                if len(part) not in trees:
                    trees[len(part)] = model.compile_tree([policies[i] for i in group], len(part))
                with torch.no_grad():
                    output = model(part.tokens, trees[len(part)], targets=part.targets)
                found = Counts.of(Batch.cat([part] * len(group)), output, model.config.chunk_size)
                finite = output.loss.view(len(group), len(part), -1)[:, part.targets != IGNORED].isfinite().all(1)
                broken |= {i for i, good in zip(group, finite.tolist(), strict=True) if not good}
                for place, i in enumerate(group):
                    parts[i][task].append(found.rows(slice(place * len(part), (place + 1) * len(part))))
    return [None if i in broken else {task: Counts.cat(own) for task, own in parts[i].items()} for i in range(G)]


def run_batches(
    model: RoutedLM,
    policy: RoutingPolicy,
    sets: Mapping[str, Batch],
    *,
    routing: Routing | None = None,
    batch_size: int = 32,
) -> Iterator[tuple[str, Batch, LMOutput]]:
    """Every batch of every task, on the model's device, with what the model gives for it; errors as ``count``."""
    device = model.embed.weight.device
    model.eval()
    for task, batch in sets.items():
        for first in range(0, len(batch), batch_size):
            rows = slice(first, first + batch_size)
            part = batch.rows(rows).to(device)
            with torch.no_grad():
                routes = None if routing is None else routing(task, rows)
                output = model(part.tokens, policy, targets=part.targets, routes=routes)
            if not bool(output.loss[part.targets != IGNORED].isfinite().all()):
                raise FloatingPointError(f"logits of task {task} are not finite under this policy")
            yield task, part, output


def summary(counts: Mapping[str, Counts], kinds: Sequence[Op]) -> Evaluation:
    """The results that the counts of all tasks add up to; ``kinds`` of the model's layers."""
    text_count = sum(int(item.tokens.sum()) for item in counts.values())
    text_sum = sum(float(item.nats.sum()) for item in counts.values())
    asked = {task: int(item.asked.sum()) for task, item in counts.items()}
    errors = {task: 1.0 - int(counts[task].right.sum()) / number for task, number in asked.items() if number}
    totals = {task: item.kept.sum(0).double() for task, item in counts.items()}  # [L,R]
    chunks = {task: len(item) * item.chunks for task, item in counts.items()}
    kept = torch.stack(list(totals.values())).sum(0) / max(sum(chunks.values()), 1)
    kept_by_task = {task: total / max(chunks[task], 1) for task, total in totals.items()}
    routed = [i for i, kind in enumerate(kinds) if kind is Op.routed]

    def over_routers(kept: Tensor) -> float:
        return float(kept.mean(1)[routed].mean()) if routed else 0.0

    val_loss = text_sum / text_count if text_count else None
    in_bytes = all(item.in_bytes for item in counts.values())
    return Evaluation(
        val_loss=val_loss,
        bits_per_byte=val_loss / math.log(2) if val_loss is not None and in_bytes else None,
        errors={metric: errors.get(task) for task, metric in metrics().items()},
        kept_fraction=over_routers(kept),
        kept_by_layer=tuple(kept.mean(1).tolist()),
        kept_by_head=_nested(kept.tolist()),
        kept_fraction_by_task={task: over_routers(own) for task, own in kept_by_task.items()},
        kept_by_task={task: _nested(own.tolist()) for task, own in kept_by_task.items()},
    )


def _random_routing(policy: RoutingPolicy, routing: RandomRouting, sets: Mapping[str, Batch], heads: int) -> Routing:
    """Random routes [B,N,R] in the layers in which the policy routes; it decides in the others."""
    if len(routing.fractions) != len(policy.layers):
        raise ValueError(
            f"RandomRouting.fractions = {routing.fractions} is not allowed: it needs one for each of the "
            f"{len(policy.layers)} layers"
        )
    generator = torch.Generator().manual_seed(routing.seed)
    sizes = [(len(batch), batch.tokens.shape[1] // policy.chunk_size, heads) for batch in sets.values()]
    counts = [math.prod(size) for size in sizes]
    routes: dict[str, list[Tensor | None]] = {task: [] for task in sets}
    for layer, fraction in zip(policy.layers, routing.fractions, strict=True):
        keep = torch.zeros(sum(counts))
        keep[torch.randperm(len(keep), generator=generator)[: round(fraction * len(keep))]] = 1.0
        for (task, batch), size, part in zip(sets.items(), sizes, keep.split(counts), strict=True):
            incomplete = int(batch.tokens.shape[1] % policy.chunk_size > 0)  # the last chunk, which nothing reads
            padded = F.pad(part.view(size), (0, 0, 0, incomplete))
            routes[task].append(padded if layer.op is Op.routed else None)
    return lambda task, rows: [None if route is None else route[rows] for route in routes[task]]


if __name__ == "__main__":
    from natsl.cli.main import run_verb

    run_verb("evaluate")
