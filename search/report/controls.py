"""What the report and the terminal say of a learned router beside its controls."""

from __future__ import annotations

from html import escape

from natsl.search.controls.comparison import Comparison, InTask, Rival, Share, floor_of
from natsl.search.front import Front
from natsl.search.objective import BYTES, OBJECTIVES

_BETTER = ("hindsight", "hindsight_layer", "oracle")  # they know more than a router can, or cost something else


def share_line(comparison: Comparison) -> tuple[str, bool | None] | None:
    """What a router chooses, as a sentence, and whether that is good news; None if nothing is known of its share."""
    known = [(item.task, item.share) for item in comparison.tasks if item.share is not None]
    if not known:
        return None
    chunks = [f"{_share(share)} on {task}" for task, share in known if _selects(share)]
    heads = [f"{_share(share)} on {task}" for task, share in known if share.value is not None and not _selects(share)]
    nothing = [task for task, share in known if share.value is None]
    parts = [f"chunks: share {', '.join(chunks)}"] if chunks else []
    parts += [f"only heads: share {', '.join(heads)}"] if heads else []
    text = f"At {comparison.of} " + (f"the router chooses {'; '.join(parts)}" if parts else "there is")
    if nothing:
        text += f"{';' if parts else ''} nothing to select on {', '.join(nothing)}"
    strange = any(_is_strange(item) for item in comparison.tasks if item.share is not None)
    text += "."
    if parts and strange:
        text += " That is likely too high: the supernet was not trained with routes of other sequences."
    return text, (None if not parts or (strange and not heads) else not heads)


def _is_strange(item: InTask) -> bool:
    """Whether the share is measured with routes that the supernet was not trained with."""
    rival = _rival(item, "shuffled")
    return rival is not None and not rival.trained


def controls_section(front: Front) -> str:
    """The body of the section: a sentence per share, and a table per task."""
    lines = []
    for comparison in front.comparisons:
        line = share_line(comparison)
        if line is not None:
            style = {True: ' class="good"', False: ' class="bad"', None: ""}[line[1]]
            lines.append(f"<li{style}>{escape(line[0])}</li>")
    shares = f'<ul class="verdict">{"".join(lines)}</ul>' if lines else ""
    tasks = list(dict.fromkeys(item.task for comparison in front.comparisons for item in comparison.tasks))
    return shares + "".join(_task(front, task) for task in tasks) + _heads(front)


def _task(front: Front, task: str) -> str:
    """The points of the front, across, beside their controls, down, in one task."""
    columns = [(comparison.of, item) for comparison in front.comparisons for item in comparison.tasks]
    columns = [(of, item) for of, item in columns if item.task == task]
    metric = columns[0][1].metric
    heads = "".join(
        f"<th>{escape(of)}{' ◎' if of == front.knee else ''}<small>kept {_kept(item.learned)}</small>"
        f"<small>{BYTES.show(item.learned.bytes)}</small></th>"
        for of, item in columns
    )
    labels = {rival.name: rival for _, item in columns for rival in (item.learned, *item.rivals)}
    rows = []
    for name, rival in labels.items():
        note = "" if rival.trained else "<small>off-distribution</small>"
        cells = "".join(f"<td{_verdict(item, name)}>{_cell(item, name)}</td>" for _, item in columns)
        rows.append(f"<tr><th>{escape(rival.label)}{note}</th>{cells}</tr>")
    shares = "".join(f"<td>{'–' if item.share is None else _share(item.share)}</td>" for _, item in columns)
    note = "<small>off-distribution: likely too high</small>" if any(_is_strange(item) for _, item in columns) else ""
    rows.append(f"<tr><th>selection share{note}</th>{shares}</tr>")
    head = f"<tr><th>{escape(OBJECTIVES[metric].label)} in {escape(task)}</th>{heads}</tr>"
    table = f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll controls">{table}</div>'


def _heads(front: Front) -> str:
    """What the compared points keep in each task, layer and head, folded."""
    rows = []
    for comparison in front.comparisons:
        for task, kept in front.point(comparison.of).measured.get("kept_by_task", {}).items():
            layers = (", ".join(f"{100 * value:.1f}" for value in heads) for heads in kept["by_head"])
            cells = "".join(f"<td>{heads}</td>" for heads in layers)
            rows.append(f"<tr><th>{escape(comparison.of)}</th><td>{escape(task)}</td>{cells}</tr>")
    if not rows:
        return ""
    titles = "".join(f"<th>layer {i}</th>" for i in range(len(front.points[0].policy.layers)))
    head = f"<tr><th>point</th><th>task</th>{titles}</tr>"
    table = f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"
    title = "Chunks kept in each task, layer and head, in %"
    return f'<details><summary>{title}</summary><div class="scroll">{table}</div></details>'


def _cell(item: InTask, name: str) -> str:
    rival = _rival(item, name)
    if rival is None:
        return "–"
    show = OBJECTIVES[item.metric].show
    spread = f"<small>± {show(rival.std)}</small>" if rival.draws > 1 else ""
    other = abs(rival.kept - item.learned.kept) > 1e-6
    return show(rival.value) + spread + (f"<small>kept {_kept(rival)}</small>" if other else "")


def _verdict(item: InTask, name: str) -> str:
    """The class of a cell: whether the learned router is better than this control by more than chance."""
    rival = _rival(item, name)
    if rival is None or rival is item.learned or name in _BETTER:
        return ""
    gain, least = rival.value - item.learned.value, max(rival.std, floor_of(item.metric))
    return ' class="good"' if gain > least else ' class="bad"' if gain < -least else ""


def _rival(item: InTask, name: str) -> Rival | None:
    return next((rival for rival in (item.learned, *item.rivals) if rival.name == name), None)


def _kept(rival: Rival) -> str:
    return OBJECTIVES["kept_fraction"].show(rival.kept)


def _selects(share: Share) -> bool:
    """Whether a share is above 0 by two standard errors."""
    return share.value is not None and share.error is not None and share.value > 2 * share.error


def _share(share: Share) -> str:
    if share.value is None or share.error is None:
        return "nothing to select"
    return f"{_short(share.value)} ± {_short(share.error)}"


def _short(value: float) -> str:
    """Two digits after the point, without a zero before it."""
    text = f"{abs(value):.2f}"
    return ("−" if value < 0 else "") + (text[1:] if text.startswith("0") else text)
