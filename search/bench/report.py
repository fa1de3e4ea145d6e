"""Curves as JSON, two tables in Markdown and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from natsl.errors import UserError
from natsl.files import read_json, write_json, write_text
from natsl.search.bench.run import Curves, Setting

COUNTS = (20, 40, 60, 100, 140)  # evaluations at which the table has a column
AFTER = 100  # evaluations within which the reference is to be reached


class Results:
    """The curves in a folder: written whenever one is added, so that what ends a benchmark loses none.

    Those of other problems and samplers that are there already stay if they were made with the same setting.
    """

    def __init__(self, folder: Path, setting: Setting, reference: tuple[str, int]) -> None:
        self._folder, self._reference = folder, reference
        self._setting = {"seeds": setting.seeds, "anchors": setting.anchors, "local_share": setting.local_share}
        self.curves: list[dict[str, Any]] = []
        if (folder / "search.json").exists():
            stored = read_json(folder / "search.json")
            if not isinstance(stored, dict) or "curves" not in stored:
                raise UserError(f"{folder / 'search.json'} is not of this benchmark: choose another --out")
            self.curves = stored["curves"] if stored.get("setting") == self._setting else []

    def add(self, item: Curves) -> str:
        """Store one sampler's curves on a problem and write all files; returns its row of the table."""
        new = summary(item)
        places = [i for i, old in enumerate(self.curves) if _key(old) == _key(new)] or [len(self.curves)]
        self.curves[places[0] :] = [new, *self.curves[places[0] + 1 :]]
        plain = {"setting": self._setting, "reference": list(self._reference), "curves": self.curves}
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._folder / "search.json", plain)
        write_text(self._folder / "search.md", f"{table(self.curves)}\n{self.passed()}")
        _draw(self.curves, self._folder / "search.png")
        return table([new]).splitlines()[-1]

    def passed(self) -> str:
        """When the means pass the reference, in Markdown."""
        return passed(self.curves, *self._reference)


def summary(item: Curves) -> dict[str, Any]:
    """Mean and standard deviation of one sampler's curves over its seeds, JSON-ready."""
    seeds = len(item.volumes)
    spread = item.volumes.std(axis=0, ddof=1) if seeds > 1 else np.zeros(item.volumes.shape[1])
    return {
        "problem": item.problem,
        "sampler": item.sampler,
        "seeds": seeds,
        "seconds_per_proposal": round(item.seconds, 5),
        "mean": item.volumes.mean(axis=0).round(5).tolist(),
        "standard_deviation": spread.round(5).tolist(),
    }


def _key(item: dict[str, Any]) -> tuple[str, str]:
    return item["problem"], item["sampler"]


def table(summaries: Sequence[dict[str, Any]]) -> str:
    """Mean ± standard deviation over the seeds, in Markdown."""
    longest = max(len(item["mean"]) for item in summaries)
    counts = [count for count in COUNTS if count <= longest] or [longest]
    lines = [
        f"| problem | sampler | {' | '.join(map(str, counts))} | ms a proposal |",
        "| --- " * (len(counts) + 3) + "|",
    ]
    for item in summaries:
        cells = [_cell(item, n) if n <= len(item["mean"]) else "" for n in counts]
        time = 1000 * item["seconds_per_proposal"]
        lines.append(f"| {item['problem']} | {item['sampler']} | {' | '.join(cells)} | {time:.0f} |")
    return "\n".join(lines) + "\n"


def passed(summaries: Sequence[dict[str, Any]], sampler: str, trials: int) -> str:
    """After how many evaluations each sampler's mean is as good as the reference's after ``trials``, in Markdown.

    Where it is not within its curve, or only after ``AFTER``, its value at ``AFTER`` (or at its end) stands there too.
    """
    samplers = list(dict.fromkeys(item["sampler"] for item in summaries))
    lines = [f"| problem | {sampler} at {trials} | {' | '.join(samplers)} |", "| --- " * (len(samplers) + 2) + "|"]
    items = {_key(item): item for item in summaries}
    for problem in dict.fromkeys(item["problem"] for item in summaries):
        goal = items.get((problem, sampler))
        if goal is None or len(goal["mean"]) < trials:
            continue
        cells = [_reach(items.get((problem, name)), goal["mean"][trials - 1]) for name in samplers]
        lines.append(f"| {problem} | {_cell(goal, trials)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else f"no curve of {sampler} has {trials} evaluations\n"


def _reach(item: dict[str, Any] | None, goal: float) -> str:
    if item is None:
        return ""
    count = next((n for n, mean in enumerate(item["mean"], 1) if mean >= goal), None)
    at = min(AFTER, len(item["mean"]))
    value = f"{item['mean'][at - 1]:.4f} at {at}"
    if count is None:
        return f"no: {value}"
    return str(count) if count <= AFTER else f"{count} ({value})"


def _cell(item: dict[str, Any], count: int) -> str:
    return f"{item['mean'][count - 1]:.4f} ± {item['standard_deviation'][count - 1]:.4f}"


def _draw(summaries: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    problems = list(dict.fromkeys(item["problem"] for item in summaries))
    samplers = list(dict.fromkeys(item["sampler"] for item in summaries))
    figure = Figure(figsize=(4.2 * len(problems), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for place, problem in enumerate(problems, 1):
        axes = figure.add_subplot(1, len(problems), place)
        for item in (item for item in summaries if item["problem"] == problem):
            middle, spread = (np.array(item[name][: COUNTS[-1]]) for name in ("mean", "standard_deviation"))
            x, color = np.arange(1, len(middle) + 1), f"C{samplers.index(item['sampler'])}"
            axes.plot(x, middle, label=item["sampler"], color=color)
            axes.fill_between(x, middle - spread, middle + spread, alpha=0.15, color=color)
            if len(item["mean"]) > COUNTS[-1]:
                axes.axhline(item["mean"][-1], color=color, linestyle=":", label=f"… at {len(item['mean'])}")
        starts = [item["mean"][min(14, len(item["mean"]) - 1)] for item in summaries if item["problem"] == problem]
        ends = [max(item["mean"]) + item["standard_deviation"][-1] for item in summaries if item["problem"] == problem]
        axes.set_ylim(min(starts) - 0.002, max(ends) + 0.05 * (max(ends) - min(starts)) + 0.002)
        axes.set(title=problem, xlabel="evaluations")
        axes.grid(alpha=0.3)
        axes.legend()
        if place == 1:
            axes.set_ylabel("hypervolume")
    figure.savefig(path, dpi=90)
