"""What a search leaves in the log of its run and shows in the tracker."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from natsl.evaluate import Evaluation
from natsl.run import Run
from natsl.search.controls.comparison import Comparison
from natsl.search.front import Front, Point, amount
from natsl.search.pareto import Archive
from natsl.search.report.headline import family_line
from natsl.search.trial import Record
from natsl.search.view import FrontSoFar, SearchView
from natsl.tracking import Tracker


class Journal:
    """Records the trials of a search and its outcome; shows them in the view, if there is one."""

    def __init__(
        self, run: Run, tracker: Tracker, objectives: Sequence[str] = (), view: SearchView | None = None
    ) -> None:
        self._run = run
        self._tracker = tracker
        self._view = view
        self._objectives = tuple(objectives)
        self._front: Archive[Record] = Archive(self._objectives)
        self._failed: dict[int, str] = {}  # reasons by index of the trial

    def resume(self, records: Sequence[Record], hypervolume: float) -> None:
        """What earlier calls have found, which the log has already."""
        for record in records:
            self._keep(record)
        self._show(hypervolume)
        if records:
            self._add_rows(records, earlier=True)

    def _add_rows(self, records: Sequence[Record], earlier: bool = False) -> None:
        """Add trials to the tracked table of all of them; whenever that is sent, so is the front as it is by then."""
        columns = ["trial", "policy", *self._objectives, "kept_fraction", "share", "failed", "same as"]
        columns = list(dict.fromkeys(columns))  # a cost may be an objective
        tracker = self._tracker
        if tracker.rows("search/trials", columns, lambda: [self._row(item, columns) for item in records], earlier):
            tracker.table("search/front", columns, [self._row(item, columns) for item in self._front.items])

    def _row(self, record: Record, columns: Sequence[str]) -> list[Any]:
        cells = {
            "trial": record.id,
            "policy": record.policy.describe(),
            "kept_fraction": None if record.evaluation is None else record.evaluation.kept_fraction,
            "share": record.share,
            "failed": record.reason,
            "same as": record.same_as,
            **(record.values or {}),
        }
        return [cells.get(column) for column in columns]

    def _keep(self, record: Record) -> None:
        self._front.add(record.result, record)
        self._failed.pop(record.index, None)
        if record.reason is not None:
            self._failed[record.index] = record.reason

    def _show(self, hypervolume: float) -> None:
        if self._view is not None:
            last = next(reversed(self._failed.values()), None)
            self._view.show_front(FrontSoFar(self._front.items, hypervolume, len(self._failed), last))

    def trial(self, record: Record, hypervolume: float) -> None:
        """One finished trial, and the hypervolume after it."""
        self._keep(record)
        self._show(hypervolume)
        self._add_rows([record])
        numbers: dict[str, Any] = {"hypervolume": hypervolume, **(record.values or {})}
        if record.evaluation is not None:
            numbers |= {f"kept_layer_{i}": kept for i, kept in enumerate(record.evaluation.kept_by_layer)}
        shown = numbers if record.complete else {"hypervolume": hypervolume}  # values on a part are others
        self._tracker.log({f"search/{key}": value for key, value in shown.items()}, step=record.index)
        row = {"event": "trial", "trial": record.id, "policy": record.policy.describe(), **numbers}
        row |= {} if record.complete else {"share": record.share}
        row |= {"history": record.history} if record.history else {}
        reason = {} if record.reason is None else {"failed": record.reason}
        self._run.log(row | reason | ({} if record.same_as is None else {"same_as": record.same_as}))

    def comparison(self, comparison: Comparison, number: int) -> None:
        """What a point of the front is beside its controls; ``number``: how many were compared before."""
        shares = {f"share/{item.task}": item.share for item in comparison.tasks if item.share is not None}
        if shares:
            self._tracker.log({name: share.value for name, share in shares.items()}, step=number)

    def front(self, front: Front) -> None:
        """The front, whose files are written."""
        run, tracker = self._run, self._tracker
        tracker.summary({"hypervolume": front.hypervolume, "points": len(front.points), "knee": front.knee})
        tracker.summary({"hypervolume_test": front.hypervolume_test})
        for family in front.families:
            numbers = {"hypervolume_test": family.hypervolume_test, "gain": family.gain, "error": family.gain_error}
            tracker.summary({f"families/{family.name}/{key}": value for key, value in numbers.items()})
        against = family_line(front)
        tracker.summary({"front_against_sweeps": None if against is None else against[0]})
        knee = front.comparison(front.knee)
        shares = {item.task: item.share for item in knee.tasks if item.share is not None} if knee is not None else {}
        tracker.summary({f"selection_share/{task}": share.value for task, share in shares.items()})
        rows = [
            [
                item.name,
                "front" if isinstance(item, Point) else item.kind.value,
                item.policy.describe(),
                *(amount(item, name) for name in front.measures),
            ]
            for item in front.rows
        ]
        tracker.table("front", ["name", "kind", "policy", *front.measures], rows)
        controls = [
            [comparison.of, item.task, item.metric, rival.name, rival.value, rival.std, rival.kept, rival.trained]
            for comparison in front.comparisons
            for item in comparison.tasks
            for rival in (item.learned, *item.rivals)
        ]
        columns = ["point", "task", "measure", "control", "value", "std", "kept", "trained"]
        tracker.table("controls", columns, controls)
        tracker.image("front_plot", run.front_png)
        tracker.html("report", run.report)
        heads = [
            [point.id, layer, head, share]
            for point in front.points
            for layer, shares in enumerate(point.measured["kept_by_head"])
            for head, share in enumerate(shares)
        ]
        tracker.table("kept", ["point", "layer", "head", "kept"], heads)
        for of in dict.fromkeys([front.knee, *(item.of for item in front.comparisons)]):
            if of is not None:
                tracker.image(f"kept_by_head/{of}", partial(_kept_picture, front.point(of)))
        tracker.file(f"{run.name}-front", run.front_json)
        tracker.file(f"{run.name}-report", run.report, kind="report")


def _kept_picture(point: Point) -> bytes:
    from natsl.search.report.evaluation import kept_png

    return kept_png(Evaluation.from_dict(point.measured), point.policy, f"{point.id}, test split")
