"""What a trial of a search is: proposed, being judged, finished."""

from __future__ import annotations

from dataclasses import dataclass

import optuna

from natsl.evaluate import Evaluation
from natsl.search.rungs import Result
from natsl.space.policy import RoutingPolicy


@dataclass(frozen=True)
class Record:
    """One finished trial. ``index`` counts finished trials from 0; ``number`` is Optuna's, cut-off trials included.

    ``values`` and ``evaluation`` are null if it failed, and ``reason`` says why. ``feasible``: keeps all constraints.
    ``same_as``: index of the earlier trial of the same policy whose result was used. ``transient``: it failed by a
    fault of the machine, which says nothing about the policy: the next process tries it again. ``parts``: its results
    on growing parts of the held-out sequences, objectives and by how much constraints are broken; ``share``: of the
    sequences that its values are of. ``history``: what went wrong with its workers before, a line each.
    """

    index: int
    number: int
    policy: RoutingPolicy
    values: dict[str, float] | None
    evaluation: Evaluation | None
    feasible: bool
    reason: str | None = None
    same_as: int | None = None
    transient: bool = False
    parts: tuple[Result, ...] = ()
    share: float = 1.0
    history: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether it was judged on all sequences, if it did not fail."""
        return self.share == 1

    @property
    def result(self) -> dict[str, float] | None:
        """The values if they may be part of a front (null: failed, breaks a constraint, or judged only on a part)."""
        return self.values if self.feasible and self.complete else None

    @property
    def id(self) -> str:
        """Name of the trial, the same however often the search was resumed."""
        return f"t{self.index:04d}"


@dataclass(frozen=True)
class Proposal:
    """A policy to be evaluated next; ``known`` is the record of an earlier trial of the same policy.

    ``batch``: Optuna's number of the first trial that was proposed from the same results.
    """

    trial: optuna.Trial
    index: int
    policy: RoutingPolicy
    known: Record | None
    batch: int


@dataclass
class Work:
    """A proposal that is being judged: its last evaluation, or why there is none, and the rest as in ``Record``."""

    proposal: Proposal
    begun: bool = False
    finished: bool = False
    evaluation: Evaluation | None = None
    reason: str | None = None
    transient: bool = False
    parts: tuple[Result, ...] = ()
    share: float = 1.0
    history: tuple[str, ...] = ()
