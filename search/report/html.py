"""``report.html``: one file that needs no network, drawn only from a ``Front``."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from natsl.search.front import Baseline, Front, Kind, Point, amount, kept_in
from natsl.search.objective import OBJECTIVES
from natsl.search.report.chart import Axis, Mark, Marker, Series, chart, dumbbells, legend
from natsl.search.report.controls import controls_section
from natsl.search.report.headline import gain, headline
from natsl.search.report.lengths import lengths_section
from natsl.search.report.plane import axis, first_names, picture, planes, show
from natsl.search.report.style import STYLE
from natsl.space.policy import Op

_UNIT = (
    "in units of the box between the worse and the better of all-softmax and all-delta on the search split. A policy "
    "that is better than the better of the two in some objective dominates volume outside of the box: more than 1 is "
    "possible."
)
_ROWS = 30  # rows of the comparison with random routing: more would not be read


def render(front: Front) -> str:
    """The report as HTML; everything that comes from outside is escaped."""
    title = f"natsl search: {front.run}"
    sections = [
        _summary(front),
        _fronts(front),
        _families(front),
        _controls(front),
        _lengths(front),
        _random(front),
        _budgets(front),
        _policies(front),
        _points(front),
        _baselines(front),
        _volume(front),
        _reproduce(front),
    ]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>",
            *sections,
            "</main>\n</body>\n</html>\n",
        ]
    )


def _summary(front: Front) -> str:
    lines = []
    for text, good in headline(front):
        style = "" if good is None else f' class="{"good" if good else "bad"}"'
        sign = "" if good is None else ("✓ " if good else "✗ ")
        lines.append(f"<li{style}>{sign}{escape(text)}</li>")
    volume = {"hypervolume, search split": f"{front.hypervolume:.4f}"}
    if front.hypervolume_test is not None:
        volume = {"hypervolume, test split": f"{front.hypervolume_test:.4f}"}
    facts = {"points": len(front.points), **volume, **front.facts.get("counts", {})}
    cards = "".join(f"<div><b>{escape(str(value))}</b>{escape(str(name))}</div>" for name, value in facts.items())
    notes = "".join(f"<p class=bad>{escape(str(note))}</p>" for note in front.facts.get("problems", []))
    verdict = f'<ul class="verdict">{"".join(lines)}</ul>'
    return f'<h1>{escape(front.run)}</h1>\n{verdict}\n<div class="cards">{cards}</div>{notes}'


def _section(title: str, body: str, note: str = "") -> str:
    return f"<section><h2>{escape(title)}</h2>{f'<p class=note>{escape(note)}</p>' if note else ''}\n{body}\n</section>"


def _fronts(front: Front) -> str:
    pairs = planes(front)
    figures: list[str] = []
    for across, up in pairs:
        drawn = picture(front, across, up)
        name = f"{OBJECTIVES[up].label} over {OBJECTIVES[across].label}"
        key = legend(drawn.series) if len(pairs) <= 3 or not figures else ""
        outside = f"<p class=note>{escape(drawn.note)}</p>" if drawn.note else ""
        figures.append(f"<figure>{chart(name, drawn.series, drawn.x, drawn.y)}{outside}{key}</figure>")
    return _section(
        "The front and what it has to beat",
        f'<div class="figures{" wide" if len(pairs) == 1 else ""}">{"".join(figures)}</div>',
        "Chosen on the search split, drawn as scored again on the test split. Down and left is better. "
        "Point at a mark for its policy; the points of the front lead to their rows below. Thin lines: sweeps of one "
        "number, with mixtures of requests between two of a sweep.",
    )


def _families(front: Front) -> str:
    if not front.families or front.hypervolume_test is None or not front.points:
        return ""

    def row(name: str, text: str, search: float, test: float, last: str) -> str:
        volumes = f"<td>{test:.4f}<small>{search:.4f}</small></td>"
        return f"<tr><th>{escape(name)}<small>{escape(text)}</small></th>{volumes}{last}</tr>"

    rows = [row("front", f"{len(front.points)} policies", front.hypervolume, front.hypervolume_test, "<td></td>")]
    for item in sorted(front.families, key=lambda item: -item.hypervolume_test):
        if not item.members:
            rows.append(f"<tr><th>{escape(item.name)}</th><td>–</td><td>none keeps the constraints</td></tr>")
            continue
        style = "" if item.is_beaten is None else f' class="{"good" if item.is_beaten else "bad"}"'
        text = f"{item.label}: {len(item.members)} policies"
        cell = f"<td{style}>{gain(item)}</td>"
        rows.append(row(item.name, text, item.hypervolume_search, item.hypervolume_test, cell))
    head = "<tr><th>family</th><th>hypervolume<small>search split</small></th><th>front − family</th></tr>"
    note = (
        "What sweeps of one number find, each reduced to its own front on the search split, as the search is. "
        f"Hypervolume on the test split, below it on the search split: the volume that the policies dominate, {_UNIT} "
        "±: standard error over the test sequences, which are the same for both. Green: the front is better by more "
        "than one standard error, red: not."
    )
    made = front.facts.get("evaluations", {}).get("families")
    note += "" if made is None else f" The families took {made} evaluations of their own on the search split."
    return _section("The front against sweeps", f'<div class="sweeps">{_table(head, rows)}</div>', note)


def _controls(front: Front) -> str:
    if not front.comparisons:
        return ""
    note = (
        "Test split, at the bytes that the learned router keeps in each task (without the own chunk). Selection share: "
        "(routes of another sequence − learned) / (routes of another sequence − hindsight), with its standard error "
        "over sequences. 0 is a router whose chunks are worth as much as those of another sequence, 1 is hindsight, "
        "which sees the answers and is first "
        "order: an estimate of what there is to select, not a bound. Green: the learned router is better by more than "
        "the spread of the draws and .005 nats or .01 of error, red: worse. Off-distribution: the supernet was not "
        "trained with such routes. Whole heads rarely cost what the router does: some requests are answered with the "
        "next cheaper choice of heads and the others with the next dearer one, so that the mean cost is the router's."
    )
    return _section("What the router chooses", controls_section(front), note)


def _lengths(front: Front) -> str:
    body = lengths_section(front)
    note = (
        "Test split. Longer sequences hold more pairs and needles, in proportion and as far as there are keys, but ask "
        "no more about pairs; the thresholds are those of the search. Costs are billed at the length of their table."
    )
    return _section("Longer sequences", body, note) if body else ""


def _random(front: Front) -> str:
    quality = front.quality
    rows = []
    for point in front.points:
        control = front.random_of(point.id)
        ours, verdict = amount(point, quality), front.beats_random(point)
        theirs = None if control is None else amount(control, quality)
        if control is None or ours is None or theirs is None:
            continue
        spread = control.std.get(quality, 0.0)
        kept = show("kept_fraction", amount(point, "kept_fraction"))
        hover = f"{point.id}, {kept} kept: learned {show(quality, ours)}"
        other = f"random routing: {show(quality, theirs)} ± {show(quality, spread)} over {control.draws} draws"
        rows.append((kept, Mark(ours, 0, hover), Mark(theirs, 0, other, spread), bool(verdict)))
    if not rows:
        return _section("Learned against random routing", "<p>No point of the front routes anything.</p>")
    shown = rows if len(rows) <= _ROWS else [rows[i * (len(rows) - 1) // (_ROWS - 1)] for i in range(_ROWS)]
    key = legend(
        [
            Series("learned", "front", (Mark(0, 0),)),
            Series("random routing, mean and spread of its draws", "random", (Mark(0, 0),), Marker.diamond),
        ]
    )
    drawn = dumbbells("learned against random routing", shown, axis(quality))
    note = (
        f"One row per point of the front{'' if shown is rows else f' ({_ROWS} of {len(rows)})'}, labelled by the "
        "fraction of chunks kept. Random routing keeps the same fraction in every layer, spread over all its heads: a "
        "router that only chooses heads beats it. A green bar: the learned router is better by more than the spread of "
        "the draws; a red one: it is not."
    )
    return _section("Learned against random routing", f'<figure class="narrow">{drawn}{key}</figure>', note)


def _budgets(front: Front) -> str:
    uniform = [item for item in front.baselines if item.kind in (Kind.uniform, Kind.extreme)]
    if not any(item.kind is Kind.uniform for item in uniform):
        return ""
    names = {item.name for item in uniform}
    random = [item for item in front.baselines if item.of in names]
    measures = [name for name in (front.quality, "val_loss") if amount(uniform[0], name) is not None]
    figures = []
    for name in dict.fromkeys(measures):
        drawn = []
        for label, style, items, shape in (
            ("learned, same budget in every layer", "front", uniform, Marker.dot),
            ("random routing", "random", random, Marker.diamond),
        ):
            marks = []
            for item in items:
                kept, value, spread = amount(item, "kept_fraction"), amount(item, name), item.std.get(name, 0.0)
                if kept is not None and value is not None:
                    text = f"{item.name}: {show('kept_fraction', kept)} kept, {show(name, value)}"
                    marks.append(Mark(kept, value, text, spread))
            drawn.append(Series(label, style, tuple(sorted(marks, key=lambda mark: mark.x)), shape, line=True))
        title = f"{OBJECTIVES[name].label} over the fraction kept"
        figures.append(f"<figure>{chart(title, drawn, axis('kept_fraction'), axis(name))}{legend(drawn)}</figure>")
    rows = []
    for item in uniform:
        if item.kind is Kind.uniform:
            asked = next(layer.mean_budget() for layer in item.policy.layers if layer.op is Op.routed)
            layers = "".join(f"<td>{show('kept_fraction', v)}</td>" for v in item.measured["kept_by_layer"])
            total = show("kept_fraction", amount(item, "kept_fraction"))
            tasks = _task_cells(front, item)
            rows.append(f"<tr><td>{show('kept_fraction', asked)}</td><td>{total}</td>{tasks}{layers}</tr>")
    heads = "".join(f"<th>layer {i}</th>" for i in range(len(uniform[0].policy.layers)))
    head = f"<tr><th>budget asked for</th><th>kept</th>{_task_heads(front)}{heads}</tr>"
    table = _folded("Budget asked for and fraction measured", head, rows)
    return _section("Quality over budget", f'<div class="figures">{"".join(figures)}</div>{table}')


def _policies(front: Front) -> str:
    if not front.points:
        return ""
    rows = []
    for point in front.points:
        cells = []
        layers = zip(point.policy.layers, point.measured["kept_by_layer"], point.measured["kept_by_head"], strict=True)
        for i, (layer, kept, heads) in enumerate(layers):
            per_head = ", ".join(f"{100 * value:.0f} %" for value in heads)
            text = f"layer {i}: {layer.op.value}, {layer.describe()}, kept {show('kept_fraction', kept)}"
            text += f" (heads {per_head})"
            bars = "".join(f'<i style="height:{100 * min(max(v, 0.0), 1.0):.1f}%"></i>' for v in heads)
            cells.append(f'<span class="{layer.op.value}" title="{escape(text)}">{bars}</span>')
        mark = " ◎" if point.id == front.knee else ""
        kept = show("kept_fraction", amount(point, "kept_fraction"))
        value = show(front.quality, amount(point, front.quality))
        rows.append(
            f'<div class="policy"><b>{escape(point.id)}{mark}</b><div class="bars">{"".join(cells)}</div>'
            f"<span>{kept}</span><span>{value}</span></div>"
        )
    head = (
        '<div class="policy head"><b></b><div class="bars">first layer → last layer</div>'
        f"<span>kept</span><span>{escape(OBJECTIVES[front.quality].label)}</span></div>"
    )
    key = (
        '<ul class="legend ops"><li><i class="softmax"></i>all-softmax</li><li><i class="routed"></i>routed</li>'
        '<li><i class="delta"></i>delta only (nothing kept)</li></ul>'
    )
    note = "One box per layer, one bar per routing head: its height is the fraction of chunks kept on the test split."
    return _section("Policies of the front", f'<div class="policies">{head}{"".join(rows)}</div>{key}', note)


def _points(front: Front) -> str:
    if not front.points:
        return ""
    quality = front.quality
    extra = [name for name in dict.fromkeys(("kept_fraction", quality, "val_loss")) if name not in front.objectives]
    heads = [f"<th>{escape(OBJECTIVES[name].label)}<small>search split</small></th>" for name in front.objectives]
    heads += [f"<th>{escape(OBJECTIVES[name].label)}</th>" for name in extra]
    heads.append(_task_heads(front))
    titles = (f"{OBJECTIVES[quality].label}, random routing", "dominated by", "export")
    tail = "".join(f"<th>{escape(title)}</th>" for title in titles)
    head = f"<tr><th>point</th><th>policy</th>{''.join(heads)}{tail}</tr>"
    rows = []
    for point in front.points:
        cells = [
            f"<td>{show(name, point.values[name])}<small>{show(name, point.search_values[name])}</small></td>"
            for name in front.objectives
        ]
        cells += [f"<td>{show(name, amount(point, name))}</td>" for name in extra]
        cells.append(_task_cells(front, point))
        control = front.random_of(point.id)
        if control is None:
            cells.append("<td>–</td>")
        else:
            spread = show(quality, control.std.get(quality, 0.0))
            style = "good" if front.beats_random(point) else "bad"
            cells.append(f'<td class="{style}">{show(quality, amount(control, quality))}<small>± {spread}</small></td>')
        cells.append(f'<td class="names">{_names(point.dominated_by)}</td>')
        command = f"natsl export {front.facts.get('select', f'run={front.run}')} pick={point.id}"
        name = f"{escape(point.id)}{' ◎ knee' if point.id == front.knee else ''}"
        policy = f"<td><code>{escape(_clip(point.policy.describe()))}</code><small>{point.policy.digest()}</small></td>"
        cells.append(f'<td><code class="command">{escape(command)}</code></td>')
        rows.append(f'<tr id="{escape(point.id)}"><th>{name}</th>{policy}{"".join(cells)}</tr>')
    note = (
        "Test split; small figures below are from the search split, on which the points were chosen. In a policy: D "
        "delta, S all-softmax, a number is the budget of a routed layer. The knee (◎) has the least sum of objectives, "
        "each scaled from the better (0) to the worse (1) of all-softmax and all-delta on the search split."
    )
    if front.tasks:
        note += (
            " A threshold serves all tasks and need not keep as much of each: the chunks kept in a task are those of "
            "its own sequences."
        )
    return _section("Points and how to take one", _table(head, rows), note)


def _names(names: Sequence[str]) -> str:
    """The first names; where there are more, all of them unfold."""
    few, every = first_names(names), ", ".join(names)
    if not names or few == every:
        return escape(few)
    return f"<details><summary>{escape(few)}</summary>{escape(every)}</details>"


def _baselines(front: Front) -> str:
    names = list(dict.fromkeys([*front.objectives, "kept_fraction", front.quality, "val_loss"]))
    titles = "".join(f"<th>{escape(OBJECTIVES[name].label)}</th>" for name in names)
    head = f"<tr><th>baseline</th>{titles}{_task_heads(front)}</tr>"
    rows = []
    for item in front.rows:
        if isinstance(item, Point):
            continue
        cells = []
        for name in names:
            spread = f"<small>± {show(name, item.std[name])}</small>" if name in item.std else ""
            cells.append(f"<td>{show(name, amount(item, name))}{spread}</td>")
        rows.append(f"<tr><th>{escape(item.name)}</th>{''.join(cells)}{_task_cells(front, item)}</tr>")
    return _section("Baselines", _folded(f"All {len(rows)} baselines on the test split", head, rows))


def _task_heads(front: Front) -> str:
    """Titles of the columns of ``_task_cells``."""
    return "".join(f"<th>kept<small>in {escape(task)}</small></th>" for task in front.tasks)


def _task_cells(front: Front, item: Point | Baseline) -> str:
    """The fraction kept in each task, if there are several."""
    return "".join(f"<td>{show('kept_fraction', kept_in(item, task))}</td>" for task in front.tasks)


def _volume(front: Front) -> str:
    marks = tuple(Mark(i + 1, value, f"trial {i}: {value:.4f}") for i, value in enumerate(front.history))
    if len(marks) > 400:
        marks = tuple(marks[i * (len(marks) - 1) // 399] for i in range(400))
    drawn = [Series("hypervolume", "front", marks, Marker.none, line=True, step=True)]
    x = Axis("trials", lambda v: f"{v:g}")
    curve = chart("hypervolume over trials", drawn, x, Axis("hypervolume", lambda v: f"{v:.4g}"))
    note = (
        f"The volume that the front dominates on the search split, {_UNIT} The table of sweeps has that of the test "
        "split. A flat end: more trials would add little."
    )
    return _section("Hypervolume over trials", f'<figure class="narrow">{curve}</figure>', note)


def _reproduce(front: Front) -> str:
    commands = "\n".join(str(command) for command in front.facts.get("commands", []))
    evaluations = {"evaluations": front.facts.get("evaluations", {})}
    rows = [
        f"<tr><th>{escape(key)}</th><td>{escape(_clip(str(value), 200))}</td></tr>"
        for source in (front.facts.get("setting", {}), evaluations, front.fingerprint)
        for key, value in _flat(source)
    ]
    block = f"<pre>{escape(commands)}</pre>" if commands else ""
    return _section("Reproduce", block + _folded("Settings and fingerprints", "", rows))


def _flat(source: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in source.items():
        found += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [(f"{prefix}{key}", value)]
    return found


def _table(head: str, rows: Sequence[str]) -> str:
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def _folded(title: str, head: str, rows: Sequence[str]) -> str:
    return f"<details><summary>{escape(title)}</summary>{_table(head, rows)}</details>"


def _clip(text: str, length: int = 80) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
