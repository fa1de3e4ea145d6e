"""What a specialisation gained: a policy under the weights before and after, on the same held-out sequences.

After training the same budgets may keep more or less than before. So the gain is taken at the kept fraction of before,
with budgets that were changed for that on the search split. Shapes: B sequences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from natsl.counts import Counts
from natsl.data import Split, TaskData
from natsl.errors import UserError
from natsl.evaluate import count, summary
from natsl.model import RoutedLM
from natsl.search.controls.comparer import task_quality
from natsl.space.policy import LayerPolicy, RoutingPolicy

SAME = 0.02  # relative difference of two kept fractions that counts as none
_WIDEST, _HALVINGS = 4.0, 12  # of the search for a factor of the budgets
ROWS = {"before": "supernet", "after": "specialised", "equal": "  at as many kept chunks"}


def compare(before: RoutedLM, after: RoutedLM, policy: RoutingPolicy, data: TaskData) -> dict[str, Any]:
    """The policy under both weights on the search and the test split, JSON-ready.

    An entry per split: ``before``, ``after`` and ``equal`` are evaluations with the ``quality`` of each task, the last
    one that of ``after`` under ``equal_policy``, which is null where the policy keeps as much as before (``SAME``), or
    no budgets do. ``gain``: see ``gains``. ``UserError`` if results are not finite.
    """
    sets = {split: data.eval_sets(split) for split in (Split.search, Split.test)}
    try:
        equal = equal_policy(before, after, policy, sets[Split.search])
        report: dict[str, Any] = {"equal_policy": None if equal is None else equal.to_dict()}
        for split, batches in sets.items():
            counts = {"before": count(before, policy, batches), "after": count(after, policy, batches)}
            if equal is not None:
                counts["equal"] = count(after, equal, batches)
            report[split.value] = {
                "sequences": {task: len(batch) for task, batch in batches.items()},
                **{
                    name: summary(item, after.kinds).to_dict() | {"quality": quality(item)}
                    for name, item in counts.items()
                },
                "gain": gains(counts["before"], counts.get("equal", counts["after"])),
            }
    except FloatingPointError as error:
        raise UserError(f"what the specialisation gained cannot be measured: {error}") from None
    return report


def equal_policy(
    before: RoutedLM, after: RoutedLM, policy: RoutingPolicy, sets: Mapping[str, Any]
) -> RoutingPolicy | None:
    """The policy with budgets under which ``after`` keeps what ``before`` keeps under it (None: see ``compare``)."""

    def kept(model: RoutedLM, policy: RoutingPolicy) -> float:
        return summary(count(model, policy, sets), model.kinds).kept_fraction

    def miss(value: float) -> float:
        return abs(value - wanted) / max(wanted, 1e-9)

    wanted = kept(before, policy)
    if miss(kept(after, policy)) <= SAME:
        return None
    low, high = -math.log(_WIDEST), math.log(_WIDEST)
    best: tuple[float, RoutingPolicy] | None = None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        tried = scaled(policy, math.exp(middle))
        value = kept(after, tried)
        if best is None or miss(value) < best[0]:
            best = miss(value), tried
        low, high = (middle, high) if value < wanted else (low, middle)
    return best[1] if best is not None and best[0] <= SAME else None


def scaled(policy: RoutingPolicy, factor: float) -> RoutingPolicy:
    """The policy with budgets that are neither 0 nor 1 times ``factor``, and thresholds less the logarithm of it."""

    def budget(value: float) -> float:
        return min(1.0, value * factor) if 0 < value < 1 else value

    def each(value: Any, change: Any) -> Any:
        return tuple(map(change, value)) if isinstance(value, tuple) else change(value)

    def layer(old: LayerPolicy) -> LayerPolicy:
        if old.budget is not None:
            return replace(old, budget=each(old.budget, budget))
        if old.threshold is not None:
            return replace(old, threshold=each(old.threshold, lambda value: value - math.log(factor)))
        return old

    return RoutingPolicy(tuple(map(layer, policy.layers)), policy.chunk_size)


def quality(counts: Mapping[str, Counts]) -> dict[str, float]:
    """The measures of ``gains`` by task."""
    return {name: float(amounts.sum() / weights.sum()) for name, (_, amounts, weights) in _measures(counts).items()}


def gains(before: Mapping[str, Counts], after: Mapping[str, Counts]) -> dict[str, dict[str, Any]]:
    """How much smaller each task's own measure has become: wrong answers, else nats per token of text.

    Where that is the loss of text for no task, ``text`` is the loss of all of their text. ``standard_error`` is that of
    the difference over the sequences, which are paired (null: one sequence); ``verdict`` is ``better`` or ``worse``
    where the difference is larger than two of that, else ``same``.
    """
    theirs, ours = _measures(before), _measures(after)
    result = {}
    for name, (metric, amounts, weights) in theirs.items():
        total, n = float(weights.sum()), len(weights)
        difference = amounts - ours[name][1]
        gain, error = float(difference.sum()) / total, None
        if n > 1:
            error = math.sqrt(n / (n - 1) * float((difference - gain * weights).square().sum())) / total
        clear = abs(gain) > 2 * (error or 0.0)
        verdict = ("better" if gain > 0 else "worse") if clear else "same"
        result[name] = {"metric": metric, "gain": gain, "standard_error": error, "verdict": verdict}
    return result


def _measures(counts: Mapping[str, Counts]) -> dict[str, tuple[str, Tensor, Tensor]]:
    """Metric, amounts and weights [B] by task, as of ``task_quality``; what nothing is scored for is left out."""
    result = {task: task_quality(task, item) for task, item in counts.items()}
    if all(metric != "val_loss" for metric, *_ in result.values()):
        nats, tokens = (torch.cat([getattr(item, name) for item in counts.values()]) for name in ("nats", "tokens"))
        result["text"] = "val_loss", nats, tokens.double()
    return {name: item for name, item in result.items() if float(item[2].sum()) > 0}


def lines(report: Mapping[str, Any]) -> list[str]:
    """What ``compare`` has measured: a table for each split, then what the test split says in words."""
    shown: list[str] = []
    for split in (Split.search, Split.test):
        part = report[split.value]
        sequences = ", ".join(f"{number} {task}" for task, number in part["sequences"].items())
        measures = [f"{gain['metric']} ({name})" for name, gain in part["gain"].items()]
        rows = [[f"{split.value} split ({sequences})", "kept", *measures]]
        for name, label in ROWS.items():
            if name in part:
                values = [f"{part[name]['quality'][task]:.4f}" for task in part["gain"]]
                rows.append([label, f"{100 * part[name]['kept_fraction']:.2f} %", *values])
        rows.append(["gain", "", *map(_shown, part["gain"].values())])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        shown += ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return shown + _words(report)


def _shown(gain: Mapping[str, Any]) -> str:
    error = gain["standard_error"]
    return f"{gain['gain']:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def _words(report: Mapping[str, Any]) -> list[str]:
    part = report[Split.test.value]
    words = {"better": "better", "worse": "worse than before", "same": "no different beyond two standard errors"}
    text = "; ".join(f"{gain['metric']} ({task}) is {words[gain['verdict']]}" for task, gain in part["gain"].items())
    result = [f"On the test split {text}."]
    if any(gain["verdict"] == "worse" for gain in part["gain"].values()):
        result.append(
            "The specialised weights are worse there than those of the supernet: export that, or try another train.lr."
        )
    before, after = (part[name]["kept_fraction"] for name in ("before", "after"))
    if "equal" in part:
        result.append(
            f"Under the same policy {100 * after:.2f} instead of {100 * before:.2f} % of the chunks are kept now; the "
            "gain is under equal_policy in specialise.json, which keeps as many of the search split as before."
        )
    elif abs(after - before) > SAME * max(before, after):
        result.append(
            f"{100 * after:.2f} instead of {100 * before:.2f} % of the chunks are kept: that is not at equal cost."
        )
    return result
