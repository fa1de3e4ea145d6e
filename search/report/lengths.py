"""What the report says of policies that were measured again on longer sequences, and of the length that is billed."""

from __future__ import annotations

from html import escape

from natsl.search.front import Front
from natsl.search.lengths import AtLength
from natsl.search.objective import OBJECTIVES, Role
from natsl.search.report.plane import show
from natsl.tasks import metrics


def billing_line(front: Front) -> str | None:
    """What costs are billed at, where that is not the length that was searched; None where it is."""
    lengths = front.lengths
    if lengths is None or lengths.billed_at == lengths.searched_at:
        return None
    text = (
        f"Kept fractions were measured at {lengths.searched_at:,} tokens and costs are billed at {lengths.billed_at:,}"
    )
    again = any(item.tokens == lengths.billed_at and item.measured for item in lengths.measured)
    return text + (", where some policies were measured again." if again else ": nothing was measured there.")


def lengths_section(front: Front) -> str:
    """The body of the section: a line on what was billed, and a table per length ("" if there is nothing to say)."""
    line = billing_line(front)
    parts = [f"<p>{escape(line)}</p>"] if line else []
    if front.lengths is not None:
        parts += [_at(front, item) for item in front.lengths.measured]
    return "".join(parts)


def _at(front: Front, item: AtLength) -> str:
    notes = [f"{item.sequences} sequences of each task, other ones than at other lengths"]
    for task, planted in item.planted.items():
        capped = f", not {planted.wanted}: there are no more keys" if planted.count < planted.wanted else ""
        notes.append(f"{planted.count} to recall in {task}{capped}")
    notes += [f"{name} left out: {reason}" for name, reason in item.left_out.items()]
    rows = []
    qualities = ["val_loss", *metrics().values()]
    qualities = [name for name in qualities if any(of.get(name) is not None for of in item.measured.values())]
    tasks = list(dict.fromkeys(task for of in item.measured.values() for task in of.get("kept_by_task", {})))
    tasks = tasks if len(tasks) > 1 else []
    costs = [name for name, objective in OBJECTIVES.items() if objective.role is Role.cost]
    for name, of in item.measured.items():
        kept = [of["kept_by_task"][task]["kept_fraction"] for task in tasks]
        cells = [show(quality, of.get(quality)) for quality in qualities]
        cells += [show(cost, item.costs[name].get(cost)) for cost in costs]
        cells += [show("kept_fraction", fraction) for fraction in kept]
        mark = " ◎" if name == front.knee else ""
        rows.append(f"<tr><th>{escape(name)}{mark}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    titles = [escape(OBJECTIVES[name].label) for name in (*qualities, *costs)]
    titles += [f"kept<small>in {escape(task)}</small>" for task in tasks]
    head = f"<tr><th>{item.tokens:,} tokens</th>{''.join(f'<th>{title}</th>' for title in titles)}</tr>"
    table = f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'
    return (table if rows else f"<p>{item.tokens:,} tokens</p>") + f"<p class=note>{escape('; '.join(notes))}.</p>"
