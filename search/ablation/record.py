"""Results of jobs as they are stored, and as rows that tables and pictures are made of. Imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from natsl.search.controls.comparison import LEARNED, InTask, Rival

FORMAT = 2  # of a result; 1 knew recall at uniform budgets only
_DIGITS = 6
_RANKING = "ranking"  # a kind of predictor that only orders chunks; older results have a meaningless r2 of it


class Spread(Enum):
    """How a budget is spread over the routed layers."""

    layers = "layers"  # the total given to the best of them
    uniform = "uniform"


def rounded(value: Any) -> Any:
    """Plain data with numbers of six significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def plain_task(item: InTask, kept_by_head: Sequence[Sequence[float]]) -> dict[str, Any]:
    """A comparison in one task, JSON-ready.

    A control has ``kept`` and ``bytes`` where they are not those of the learned router, and ``std`` over its draws.
    """
    own = item.learned

    def plain(rival: Rival) -> dict[str, float]:
        entry = {"value": rival.value} | ({"std": rival.std} if rival.draws > 1 else {})
        pairs = [("kept", rival.kept, own.kept), ("bytes", rival.bytes, own.bytes)]
        return entry | {name: value for name, value, same in pairs if rounded(value) != rounded(same)}

    return {
        "metric": item.metric,
        LEARNED: {"value": own.value, "kept": own.kept, "bytes": own.bytes},
        "kept_by_head": kept_by_head,
        "controls": {rival.name: plain(rival) for rival in item.rivals},
        "selection_share": None if item.share is None else vars(item.share),
    }


@dataclass(frozen=True)
class Row:
    """One policy of one supernet in one task, at one length.

    ``quality`` (``metric``) and ``bytes`` have an entry for the learned router and for every control. ``share`` is the
    selection share with its error over sequences (None: nothing to select, or it is not known).
    """

    variant: str
    seed: int
    length: int
    spread: Spread
    budget: float
    task: str
    metric: str
    kept: float
    quality: dict[str, float]
    bytes: dict[str, float]
    share: float | None
    share_error: float | None


@dataclass(frozen=True)
class Anchor:
    """All-softmax and all-delta of one supernet in one task, at one length (None: not finite)."""

    variant: str
    seed: int
    length: int
    task: str
    metric: str
    softmax: float | None
    delta: float | None


def rows(results: Iterable[Mapping[str, Any]]) -> list[Row]:
    """A row per result, length, policy and task."""
    return [
        _row(result, at["length"], policy, task, plain)
        for result in results
        for at in result["lengths"]
        for policy in at["policies"]
        for task, plain in policy["tasks"].items()
    ]


def _row(result: Mapping[str, Any], length: int, policy: Mapping[str, Any], task: str, plain: Mapping[str, Any]) -> Row:
    own, share = plain[LEARNED], plain["selection_share"] or {}
    controls = plain["controls"].items()
    return Row(
        variant=result["variant"],
        seed=result["seed"],
        length=length,
        spread=Spread(policy["spread"]),
        budget=policy["budget"],
        task=task,
        metric=plain["metric"],
        kept=own["kept"],
        quality={LEARNED: own["value"]} | {name: item["value"] for name, item in controls},
        bytes={LEARNED: own["bytes"]} | {name: item.get("bytes", own["bytes"]) for name, item in controls},
        share=share.get("value"),
        share_error=share.get("error"),
    )


def anchors(results: Iterable[Mapping[str, Any]]) -> list[Anchor]:
    """The two ends of every result, at each length and in each task."""
    return [
        Anchor(result["variant"], result["seed"], at["length"], task, **plain)
        for result in results
        for at in result["lengths"]
        for task, plain in at["anchors"].items()
    ]


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are known (None: of none)."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def deviation(values: Iterable[float | None]) -> float | None:
    """The standard deviation of the values that are known (None: of fewer than two)."""
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) > 1 else None


def mean_share(own: Sequence[Row]) -> tuple[float, float | None] | None:
    """The mean share of rows that differ in their seed, of those that have one, and its standard deviation.

    Of one seed its error over sequences; None if no share is known.
    """
    known = [row for row in own if row.share is not None]
    value = mean(row.share for row in known)
    if value is None:
        return None
    return value, deviation(row.share for row in known) if len(known) > 1 else known[0].share_error


@dataclass(frozen=True)
class Prediction:
    """What a predictor of gains reaches in one supernet at one uniform budget, or the router itself (``learned``).

    ``r2`` (None: of the router and of predictors whose scores have no unit) and ``captured`` (None: of the router) are
    means over the heads, weighted by what their best tenth of chunks gains; ``share`` is the selection share of what it
    chooses (None: nothing to select).
    """

    variant: str
    budget: float
    name: str
    r2: float | None
    captured: float | None
    share: float | None


def predictions(results: Iterable[Mapping[str, Any]]) -> list[Prediction]:
    """The router and every predictor of each result and budget whose headroom was measured."""
    return [item for result in results for at in result["headroom"] for item in _predictions(result["variant"], at)]


def _predictions(variant: str, at: Mapping[str, Any]) -> list[Prediction]:
    prefix, layers, loss = "predicted: ", at["layers"].values(), at["loss"]
    weights = [max(gain, 1e-9) for layer in layers for gain in layer["best_tenth"]]
    found = [Prediction(variant, at["budget"], LEARNED, None, None, loss[LEARNED]["share"])]
    for name in (name.removeprefix(prefix) for name in loss if name.startswith(prefix)):
        r2, captured = ([value for layer in layers for value in layer[name].get(key, ())] for key in ("r2", "captured"))
        has_unit = r2 and not name.startswith(_RANKING)
        found.append(
            Prediction(
                variant=variant,
                budget=at["budget"],
                name=name,
                r2=statistics.fmean(r2, weights) if has_unit else None,
                captured=statistics.fmean(captured, weights),
                share=loss[prefix + name]["share"],
            )
        )
    return found
