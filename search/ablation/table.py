"""The results of an ablation as Markdown. Imports no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from natsl.search.ablation.config import AblationConfig
from natsl.search.ablation.record import (
    Anchor,
    Prediction,
    Row,
    Spread,
    anchors,
    deviation,
    mean,
    mean_share,
    predictions,
    rows,
)
from natsl.search.controls.comparison import LEARNED
from natsl.search.objective import OBJECTIVES

_CONTROLS = {
    "random_heads": "random heads",
    "static": "static heads",
    "sink_window": "window",
    "fixed_window": "fixed window",
    "fixed_half": "fixed half",
}
_NONE = "–"


def report(results: Sequence[Mapping[str, Any]], config: AblationConfig) -> str:
    """A table per length, task and budget, and what to know of them."""
    names = list(config.variants)
    all_rows, ends = rows(results), anchors(results)
    order = [task for name in names for task in config.variant(name).data.tasks]
    tasks = sorted({end.task for end in ends}, key=order.index)
    parts = []
    for length in config.factors:
        for task in tasks:
            own = [row for row in all_rows if (row.length, row.task) == (length, task)]
            own_ends = [end for end in ends if (end.length, end.task) == (length, task)]
            of_length = f", {length} × the length" if length > 1 else ""
            for budget in config.budgets if own_ends else ():
                of_budget = [row for row in own if row.budget == budget]
                parts.append(_table(of_budget, own_ends, names, f"{task} at budget {budget:g}{of_length}"))
    return "\n".join([*parts, *_headroom(results, names), *_notes(results, config)])


def _headroom(results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """A table per budget whose headroom was measured: a row per variant, the router and every predictor beside it."""
    found = predictions(results)
    predictors = list(dict.fromkeys(item.name for item in found))
    parts = []
    for budget in dict.fromkeys(item.budget for item in found):
        lines = [f"## What is known of gains at a uniform budget of {budget:g}: R² / captured · share", ""]
        lines += [_line(["variant", *predictors]), "| --- " * (len(predictors) + 1) + "|"]
        for name in names:
            own = [item for item in found if (item.variant, item.budget) == (name, budget)]
            by_name = ([item for item in own if item.name == predictor] for predictor in predictors)
            lines.append(_line([_text(name), *map(_prediction, by_name)]))
        parts += [*lines, ""]
    if parts:
        parts += [
            "Predictors are fitted on training text, the supernet frozen, from what a layer knows at the end of a "
            "chunk. R² (a ranking has none) and captured (what the tenth of the chunks with the highest predictions "
            "gains: 0 a random tenth, 1 that with the highest gains per query to come) are means over heads, weighted "
            "by what the best tenth gains.",
            "",
        ]
    return parts


def _prediction(own: Sequence[Prediction]) -> str:
    r2, captured, share = (mean(getattr(item, key) for item in own) for key in ("r2", "captured", "share"))
    r2_text, captured_text, share_text = (_NONE if x is None else f"{x:.2f}" for x in (r2, captured, share))
    return share_text if captured is None else f"{r2_text} / {captured_text} · {share_text}"


def _table(own: Sequence[Row], ends: Sequence[Anchor], names: Sequence[str], title: str) -> str:
    """A row per variant. ``own`` and ``ends`` are of one task, length and budget."""
    metric = ends[0].metric
    heads = ["variant", "all-softmax", "all-delta"]
    compared = " / ".join((LEARNED, *_CONTROLS.values()))
    for spread in Spread:
        heads += [f"{spread.value}: kept", compared, "share", f"− {_text(names[0])}"]
    lines = [f"## {title}: {OBJECTIVES[metric].label}", "", _line(heads), "| --- " * len(heads) + "|"]
    for name in names:
        mine = [end for end in ends if end.variant == name]
        cells = [_text(name), _number(mean(end.softmax for end in mine)), _number(mean(end.delta for end in mine))]
        for spread in Spread:
            of_spread = [row for row in own if row.spread is spread]
            cells += _cells([row for row in of_spread if row.variant == name])
            difference = None if name == names[0] else paired_difference(of_spread, name, names[0])
            cells.append(_NONE if difference is None else _with_error(*difference, signed=True))
        lines.append(_line(cells))
    return "\n".join([*lines, ""])


def _cells(own: Sequence[Row]) -> list[str]:
    """Kept fraction, qualities and selection share of one variant over its seeds; a control that one lacks has none."""
    if not own:
        return [_NONE] * 3
    kept = f"{100 * statistics.fmean(row.kept for row in own):.1f} %"
    learned = [row.quality[LEARNED] for row in own]
    qualities = [_with_error(statistics.fmean(learned), deviation(learned))]
    for name in _CONTROLS:
        values = [row.quality.get(name) for row in own]
        qualities.append(_NONE if None in values else _number(mean(values)))
    return [kept, " / ".join(qualities), share_text(own)]


def share_text(own: Sequence[Row]) -> str:
    """The mean share over seeds ± its standard deviation, and of how many seeds if not of all."""
    share = mean_share(own)
    if share is None:
        return _NONE
    known = sum(row.share is not None for row in own)
    value, error = share
    of_seeds = "" if known == len(own) else f" ({known} of {len(own)})"
    return f"{value:.2f}" + ("" if error is None else f" ± {error:.2f}") + of_seeds


def paired_difference(own: Sequence[Row], name: str, first: str) -> tuple[float, float | None] | None:
    """Mean over the common seeds of learned − learned of the first variant, and its standard error.

    Rows are of one task, length, spread and budget. None without a common seed; one seed has no error.
    """
    values = {(row.variant, row.seed): row.quality[LEARNED] for row in own}
    seeds = [seed for variant, seed in values if variant == name and (first, seed) in values]
    if not seeds:
        return None
    differences = [values[name, seed] - values[first, seed] for seed in seeds]
    spread = deviation(differences)
    return statistics.fmean(differences), None if spread is None else spread / math.sqrt(len(seeds))


def _notes(results: Sequence[Mapping[str, Any]], config: AblationConfig) -> list[str]:
    first = _text(next(iter(config.variants)))
    lines = [
        "Test split; smaller is better. Means over seeds, ± the standard deviation over seeds (of a share of one seed: "
        "the error over sequences; a seed with nothing to select has no share). The difference of learned to "
        f"{first} is paired by seed, ± its standard error. layers: the total budget in the layers that make the most "
        "of it, chosen on the search split; uniform: the same budget in every routed layer. In each head as many "
        "chunks as the router keeps are random or, at every point of the text, the first and the latest ones (window); "
        "the latest (fixed window), or half the latest and half by margin (fixed half), are as many from the start as "
        "it keeps in the end. Static heads keep as much in all.",
        "",
    ]
    quiet = [name for name in config.routed if config.variant(name).supernet.route_noise == 0]
    if quiet:
        lines += [
            f"Trained without route noise, so that routes of other sequences are new to the supernet and the share is "
            f"likely too high: {', '.join(map(_text, quiet))}.",
            "",
        ]
    problems = [f"{r['variant']}, seed {r['seed']}: {line}" for r in results for line in r["problems"]]
    return lines + ([f"Not scored: {_text('; '.join(problems))}.", ""] if problems else [])


def _with_error(value: float, error: float | None, signed: bool = False) -> str:
    text = f"{value:+.4f}" if signed else f"{value:.4f}"
    return text if error is None else f"{text} ± {error:.4f}"


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.4f}"


def _text(text: str) -> str:
    """Text for a cell: a bar would end it."""
    return text.replace("|", "\\|")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
