"""Quality and kept fraction of a model under one policy, on held-out sequences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from natsl.model import RoutedLM
from natsl.space.policy import Op, RoutingPolicy
from natsl.tasks import metrics
from natsl.tasks.sequences import IGNORED, Batch


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

    ``errors``: metric of every task → its error (None: the task was not evaluated). ``kept_fraction`` is the mean over
    the layers with a router; ``kept_by_layer`` has an entry per layer, ``kept_by_head`` one per layer and routing head.
    All three are over the sequences of all tasks together. ``kept_fraction_by_task`` and ``kept_by_task`` are
    ``kept_fraction`` and ``kept_by_head`` of each task's own sequences: one threshold serves all tasks, and need not
    spend its budget evenly on them. Both are empty in values from before they were measured.
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


@torch.no_grad()
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
    device = model.embed.weight.device
    chunk = model.config.chunk_size
    drawn = None if random_routing is None else _random_routes(policy, random_routing, sets, model.config.heads)
    text_sum, text_count = 0.0, 0
    errors: dict[str, float] = {}
    counts = torch.zeros(len(sets), len(model.kinds), model.config.heads, dtype=torch.float64, device=device)  # kept
    chunks = [len(batch) * (batch.tokens.shape[1] // chunk) for batch in sets.values()]
    model.eval()
    for i, (task, batch) in enumerate(sets.items()):
        right, asked = 0, 0
        for first in range(0, len(batch), batch_size):
            part = batch.rows(slice(first, first + batch_size)).to(device)
            B, T = part.tokens.shape
            routes = None
            if drawn is not None:
                routes = [None if route is None else route[first : first + B] for route in drawn[task]]
            tokens = model(part.tokens, policy, targets=part.targets, routes=routes)
            scored = part.targets != IGNORED
            if not bool(tokens.loss[scored].isfinite().all()):
                raise FloatingPointError(f"logits of task {task} are not finite under this policy")
            text = scored & ~part.recall
            text_sum += float(tokens.loss[text].double().sum())
            text_count += int(text.sum())
            right += int(tokens.right[part.recall].sum())
            asked += int(part.recall.sum())
            counts[i] += torch.stack([layer.route[:, : T // chunk].sum((0, 1)) for layer in tokens.layers]).double()
        if asked:
            errors[task] = 1.0 - right / asked
    counts = counts.cpu()
    kept = counts.sum(0) / max(sum(chunks), 1)
    kept_by_task = {task: count / max(n, 1) for task, count, n in zip(sets, counts, chunks, strict=True)}
    routed = [i for i, kind in enumerate(model.kinds) if kind is Op.routed]

    def over_routers(kept: Tensor) -> float:
        return float(kept.mean(1)[routed].mean()) if routed else 0.0

    val_loss = text_sum / text_count if text_count else None
    return Evaluation(
        val_loss=val_loss,
        bits_per_byte=None if val_loss is None else val_loss / math.log(2),
        errors={metric: errors.get(task) for task, metric in metrics().items()},
        kept_fraction=over_routers(kept),
        kept_by_layer=tuple(kept.mean(1).tolist()),
        kept_by_head=_nested(kept.tolist()),
        kept_fraction_by_task={task: over_routers(own) for task, own in kept_by_task.items()},
        kept_by_task={task: _nested(own.tolist()) for task, own in kept_by_task.items()},
    )


def _random_routes(
    policy: RoutingPolicy, routing: RandomRouting, sets: Mapping[str, Batch], heads: int
) -> dict[str, list[Tensor | None]]:
    """Per task and layer random routes [B,N,R] where the policy routes, None (the policy decides) elsewhere."""
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
    return routes


if __name__ == "__main__":
    from natsl.cli.main import run_verb

    run_verb("evaluate")
