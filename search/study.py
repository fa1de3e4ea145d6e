"""The trials of a search: propose a policy, have it evaluated, tell the result. Cut off anywhere, it resumes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.trial import FrozenTrial, TrialState

from natsl.errors import UserError
from natsl.evaluate import Evaluation
from natsl.search.config import SearchConfig
from natsl.search.fault import PERMANENT, TRANSIENT, check_machine, describe, was_transient
from natsl.search.objective import CostContext, Objective, measure
from natsl.search.pareto import non_dominated
from natsl.search.rungs import Result, goes_on
from natsl.search.samplers import Sampler, make_sampler
from natsl.search.samplers.history import SHARE
from natsl.search.storage import FINGERPRINT, Identity, OpenStudy, open_study, reported_errors
from natsl.space.cost import LayerShape
from natsl.space.policy import Op, RoutingPolicy

# Trial attributes. A trial that failed has a reason; a failed trial without one was cut off and counts for nothing.
POLICY, EVALUATION, REASON, KNOWN = "policy", "evaluation", "reason", "same_as"
FAULT = "transient"  # whether the reason is a fault of the machine
PARTS = "parts"  # results of a trial on growing parts of the sequences, the last one that of its values
INDEX = "index"  # of a trial whose policy was given, not drawn by the sampler: which record it makes

Evaluate = Callable[[RoutingPolicy, float], Evaluation]  # a policy on a share of the sequences


class SearchFailedError(UserError):
    """Too many trials failed for the search to go on."""


@dataclass(frozen=True)
class Record:
    """One finished trial. ``index`` counts finished trials from 0; ``number`` is Optuna's, cut-off trials included.

    ``values`` and ``evaluation`` are null if it failed, and ``reason`` says why. ``feasible``: keeps all constraints.
    ``same_as``: index of the earlier trial of the same policy whose result was used. ``transient``: it failed by a
    fault of the machine, which says nothing about the policy: the next process tries it again. ``parts``: its results
    on growing parts of the held-out sequences, objectives and by how much constraints are broken; ``share``: of the
    sequences that its values are of.
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
    """A policy to be evaluated next; ``known`` is the record of an earlier trial of the same policy."""

    trial: optuna.Trial
    index: int
    policy: RoutingPolicy
    known: Record | None


@dataclass(frozen=True)
class Problem:
    """What is searched: the layers of the model, what cost is counted for, what is wanted, what is tried first.

    ``given``: how many of ``first`` are the user's; the anchors of the space follow.
    """

    kinds: tuple[Op, ...]
    chunk_size: int
    costs: CostContext
    objectives: tuple[Objective, ...]
    first: tuple[RoutingPolicy, ...]
    given: int = 0

    @property
    def heads(self) -> int:
        """Routing heads of a layer."""
        return self.costs.shapes[0].heads


class PolicyStudy:
    """A study over routing policies. One process owns it at a time, until it is closed or the process ends."""

    def __init__(self, opened: OpenStudy, config: SearchConfig, problem: Problem, seed: int) -> None:
        study = opened.study
        self._opened = opened
        self.fingerprint: dict[str, Any] = study.user_attrs[FINGERPRINT]
        self.config = config
        self.problem = problem
        self.sampler = Sampler(self.fingerprint["sampler"])
        self.first = problem.first[: len(self.fingerprint["first"])]
        self.seed = seed
        self._study = study
        self._names = [item.name for item in problem.objectives]
        self.records: list[Record] = []
        self._by_digest: dict[str, Record] = {}
        self.cut_off = 0
        self.foreign: list[int] = []  # Optuna's numbers of trials that something else put into the study
        self._again: dict[int, dict[str, Any]] = {}  # parameters of the records that are to be tried again, by index
        self._made: list[Record] = []  # by this process
        for trial in study.get_trials(deepcopy=False):
            if trial.state is TrialState.RUNNING:
                study.tell(trial.number, state=TrialState.FAIL)  # its process is gone: this one owns the study
        while study.get_trials(False, (TrialState.WAITING,)):  # of a process that ended before it asked for it
            study.tell(study.ask(), state=TrialState.FAIL)
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL)):
            if trial.state is TrialState.FAIL and REASON not in trial.user_attrs:
                self.cut_off += 1
                continue
            try:
                record = self._add(self._read(trial))
                if record.transient:
                    self._again[record.index] = trial.params
            except (KeyError, TypeError, ValueError):
                self.foreign.append(trial.number)

    @property
    def remaining(self) -> int:
        """Trials that are still to be made, those that an earlier process has to leave to this one included."""
        return len(self._again) + max(0, self.config.n_trials - len(self.records))

    def propose(self) -> Proposal:
        """The next policy: what is to be tried again, then the first ones, then what the sampler draws.

        Its draws depend on (seed, index, results so far).
        """
        index, problem = min(self._again, default=len(self.records)), self.problem
        self._study.sampler = make_sampler(self.sampler, self.config.local_share, self.seed, index)
        params = self._again.get(index)
        if params is None and index < len(self.first):
            params = self.config.space.params(self.first[index], problem.kinds, problem.heads)
        if params is not None:
            self._study.enqueue_trial(params, user_attrs={INDEX: index})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            trial = self._study.ask()
            policy = self.config.space.suggest(trial, problem.kinds, problem.chunk_size, problem.heads)
        trial.set_user_attr(POLICY, policy.to_dict())
        return Proposal(trial, index, policy, self._by_digest.get(policy.digest()))

    def tell(
        self, proposal: Proposal, evaluation: Evaluation, parts: tuple[Result, ...] = (), share: float = 1.0
    ) -> Record:
        """Store a result; objectives that are missing or not finite make the trial fail.

        ``parts``, ``share``: as in ``Record``.
        """
        try:
            values, limited = self._measure(evaluation, proposal.policy)
        except FloatingPointError as error:
            return self.fail(proposal, str(error))
        trial = proposal.trial
        trial.set_user_attr(EVALUATION, evaluation.to_dict())
        trial.set_user_attr(PARTS, parts)
        if share < 1:
            trial.set_user_attr(SHARE, share)
        if proposal.known is not None:
            trial.set_user_attr(KNOWN, proposal.known.index)
        for name, value in limited.items():
            trial.set_constraint(name, value)
        self._study.tell(trial, [values[name] for name in self._names])
        same = None if proposal.known is None else proposal.known.index
        return self._add(
            Record(
                proposal.index,
                trial.number,
                proposal.policy,
                values,
                evaluation,
                feasible=all(value <= 0 for value in limited.values()),
                same_as=same,
                parts=parts,
                share=share,
            )
        )

    def _measure(self, evaluation: Evaluation, policy: RoutingPolicy) -> tuple[dict[str, float], dict[str, float]]:
        """The objectives, and by how much constrained ones are above their bounds; errors as ``measure``."""
        bounds = self.config.constraints
        values = measure(self._names, evaluation, policy, self.problem.costs)
        limited = measure(list(bounds), evaluation, policy, self.problem.costs)
        return values, {name: value - bounds[name] for name, value in limited.items()}

    def fail(self, proposal: Proposal, reason: str, transient: bool = False) -> Record:
        """Store that a policy could not be evaluated, why, and whether that was a fault of the machine."""
        proposal.trial.set_user_attr(REASON, reason)
        proposal.trial.set_user_attr(FAULT, transient)
        self._study.tell(proposal.trial, state=TrialState.FAIL)
        number, policy = proposal.trial.number, proposal.policy
        return self._add(Record(proposal.index, number, policy, None, None, False, reason, transient=transient))

    def run(
        self,
        evaluate: Evaluate,
        on_record: Callable[[Record], None] | None = None,
        probe: Callable[[], None] = lambda: None,
    ) -> None:
        """Make the remaining trials.

        ``probe`` raises ``RuntimeError`` if the device is of no use any more; it is asked after a fault of the machine.
        Raises ``SearchFailedError`` once too many trials have failed, ``DeviceLostError`` if the device is lost.
        """
        self._check_failures()
        while self.remaining:
            with reported_errors(self._opened.where):
                record = self._evaluate(self.propose(), evaluate, probe)
            self._made.append(record)
            if on_record is not None:
                on_record(record)
            self._check_failures()

    def _evaluate(self, proposal: Proposal, evaluate: Evaluate, probe: Callable[[], None]) -> Record:
        known = proposal.known
        if known is not None and not known.complete and proposal.index < len(self.first):
            proposal, known = replace(proposal, known=None), None  # these are judged on everything
        if known is not None and known.evaluation is not None:
            return self.tell(proposal, known.evaluation, known.parts, known.share)
        if known is not None:
            return self.fail(proposal, known.reason or "")
        try:
            try:
                evaluation, parts, share = self._judge(proposal, evaluate)
            except PERMANENT as error:
                return self.fail(proposal, describe(error))
            except TRANSIENT as error:
                check_machine(error, probe)
                return self.fail(proposal, describe(error), transient=True)
        except BaseException:
            # Interrupted: no reason is stored, so that the same index is proposed again on resume.
            with contextlib.suppress(StorageInternalError):
                self._study.tell(proposal.trial, state=TrialState.FAIL)
            raise
        return self.tell(proposal, evaluation, parts, share)

    def _judge(self, proposal: Proposal, evaluate: Evaluate) -> tuple[Evaluation, tuple[Result, ...], float]:
        """Judge a policy on one part after another, as long as it is worth it; the first policies always on all.

        Returns the last evaluation, the results on all parts, and the share of the sequences that it was judged on.
        """
        rungs = len(self.config.rungs)
        parts: tuple[Result, ...] = ()
        for rung, share in enumerate(self.config.rungs):
            evaluation = evaluate(proposal.policy, share)
            values, limited = self._measure(evaluation, proposal.policy)
            own = (*(values[name] for name in self._names), sum(max(0.0, value) for value in limited.values()))
            parts = (*parts, own)
            if share < 1 and proposal.index >= len(self.first):
                others = [record.parts for record in self.records if record.same_as is None]
                same = [item[rung] for item in others if len(item) > rung]
                complete = [item[-1] for item in others if len(item) == rungs]
                if not goes_on(own, same, complete):
                    break
        return evaluation, parts, share

    def _check_failures(self) -> None:
        """Failures of policies count for the whole study, all failures for the process that saw them."""
        self._check_rate([record for record in self.records if not record.transient])
        self._check_rate(self._made)

    def _check_rate(self, records: Sequence[Record]) -> None:
        failed = [record for record in records if record.reason is not None]
        limit = self.config.max_failure_rate
        if len(failed) >= self.config.min_failures and len(failed) > limit * len(records):
            raise SearchFailedError(
                f"{len(failed)} of {len(records)} trials failed, more than search.max_failure_rate = {limit:g}; "
                f"the last one: {failed[-1].reason}"
            )

    def close(self) -> None:
        """Give the study up: only ``records`` can be used afterwards."""
        self._opened.close()

    def front(self) -> list[Record]:
        """Records that keep all constraints and that no other dominates, in order of their index."""
        good = [(record, record.result) for record in self.records if record.result is not None]
        return [good[i][0] for i in non_dominated([values for _, values in good], self._names)]

    def _add(self, record: Record) -> Record:
        self.records[record.index : record.index + 1] = [record]
        self._again.pop(record.index, None)  # also if it failed: the next try is another process's
        if not record.transient:
            self._by_digest.setdefault(record.policy.digest(), record)
        return record

    def _read(self, trial: FrozenTrial) -> Record:
        """The record of a finished trial; KeyError, TypeError or ValueError if it is not one of ours."""
        attributes = trial.user_attrs
        policy = RoutingPolicy.from_dict(attributes[POLICY])
        index = attributes.get(INDEX, len(self.records))
        if not 0 <= index <= len(self.records):
            raise ValueError(f"there is no record {index}")
        if trial.state is TrialState.FAIL:
            reason = attributes[REASON]
            transient = attributes.get(FAULT, was_transient(reason))
            return Record(index, trial.number, policy, None, None, False, reason, transient=transient)
        values = dict(zip(self._names, trial.values, strict=True))
        feasible = all(value <= 0 for value in trial.constraints.values())
        return Record(
            index,
            trial.number,
            policy,
            values,
            Evaluation.from_dict(attributes[EVALUATION]),
            feasible,
            same_as=attributes.get(KNOWN),
            parts=tuple(map(tuple, attributes.get(PARTS, ()))),
            share=attributes.get(SHARE, 1.0),
        )


def open_policy_study(
    path: Path, name: str, config: SearchConfig, problem: Problem, seed: int, made_from: Mapping[str, Any]
) -> PolicyStudy:
    """The study of a run, new or resumed.

    path: the SQLite file, unless ``config.storage`` names a database. made_from: what else the trials depend on (model,
    data, checkpoint), compared on resume. Raises ``UserError`` if the storage is damaged, foreign or belongs to other
    settings.
    """

    def fingerprint(stored: Mapping[str, Any]) -> dict[str, Any]:
        """The number of anchors, if it is left to us, is chosen once, when the study is made."""
        count = first_count(config, problem.given)
        if stored and config.anchors is None:
            count = len(stored.get("first", ()))
        return {
            "objectives": {item.name: item.direction for item in problem.objectives},
            "constraints": config.constraints,
            "context": problem.costs.context,
            "space": config.space.fingerprint(),
            "first": [policy.digest() for policy in problem.first[:count]],
            "seed": seed,
            "sampler": config.sampler.value,
            "local_share": config.local_share,
            **({} if problem.costs.latency is None else {"latency": problem.costs.latency.digest()}),
            **({} if config.rungs == [1.0] else {"rungs": config.rungs}),  # a study from before there were any
            **made_from,
        }

    identity = Identity(name, [item.direction for item in problem.objectives], fingerprint)
    opened = open_study(path, config.storage, identity)
    try:
        with reported_errors(opened.where):
            return PolicyStudy(opened, config, problem, seed)
    except BaseException:
        opened.close()
        raise


def first_count(config: SearchConfig, given: int) -> int:
    """How many of the first policies of a new study are tried, of which ``given`` are the user's."""
    return given + (config.n_trials // 4 if config.anchors is None else config.anchors)


def first_policies(
    config: SearchConfig, layers: Sequence[LayerShape], chunk_size: int, given: Sequence[RoutingPolicy]
) -> tuple[RoutingPolicy, ...]:
    """What is tried before the sampler draws: the user's policies, then the anchors of the space, each once.

    Raises ``ValueError`` if one of the user's does not fit the model or is outside the space.
    """
    kinds, heads = [layer.kind for layer in layers], layers[0].heads
    for policy in given:
        policy.check(kinds, chunk_size, heads)
        config.space.params(policy, kinds, heads)
    policies = {policy.digest(): policy for policy in (*given, *config.space.anchors(kinds, chunk_size, heads))}
    return tuple(policies.values())
