"""Curves as JSON, a table in Markdown and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from natsl.files import write_json, write_text
from natsl.search.bench.run import Curves

COUNTS = (20, 40, 60, 100, 140)  # evaluations at which the table has a column


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


def write(summaries: Sequence[dict[str, Any]], folder: Path) -> None:
    """``search.json``, ``search.md`` and ``search.png`` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "search.json", {"curves": list(summaries)})
    write_text(folder / "search.md", table(summaries))
    _draw(summaries, folder / "search.png")


def table(summaries: Sequence[dict[str, Any]]) -> str:
    """Mean ± standard deviation over the seeds, in Markdown."""
    longest = max(len(item["mean"]) for item in summaries)
    counts = [count for count in COUNTS if count <= longest] or [longest]
    lines = [
        f"| problem | sampler | {' | '.join(map(str, counts))} | ms a proposal |",
        "| --- " * (len(counts) + 3) + "|",
    ]
    for item in summaries:
        cells = [
            f"{item['mean'][n - 1]:.4f} ± {item['standard_deviation'][n - 1]:.4f}" if n <= len(item["mean"]) else ""
            for n in counts
        ]
        time = 1000 * item["seconds_per_proposal"]
        lines.append(f"| {item['problem']} | {item['sampler']} | {' | '.join(cells)} | {time:.0f} |")
    return "\n".join(lines) + "\n"


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
            middle, spread = np.array(item["mean"]), np.array(item["standard_deviation"])
            x, color = np.arange(1, len(middle) + 1), f"C{samplers.index(item['sampler'])}"
            axes.plot(x, middle, label=item["sampler"], color=color)
            axes.fill_between(x, middle - spread, middle + spread, alpha=0.15, color=color)
        starts = [item["mean"][min(14, len(item["mean"]) - 1)] for item in summaries if item["problem"] == problem]
        axes.set_ylim(bottom=min(starts) - 0.002)
        axes.set(title=problem, xlabel="evaluations")
        axes.grid(alpha=0.3)
        axes.legend()
        if place == 1:
            axes.set_ylabel("hypervolume")
    figure.savefig(path, dpi=90)
