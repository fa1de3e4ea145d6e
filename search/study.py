"""The trials of a search: propose a policy, have it evaluated, tell the result. Cut off anywhere, it resumes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Engine

from natsl.evaluate import Evaluation
from natsl.search.config import SearchConfig
from natsl.search.dashboard import HISTORY, KEPT, describe_trial, introduce
from natsl.search.fault import PERMANENT, TRANSIENT, check_failures, check_machine, describe
from natsl.search.heartbeat import Heartbeat
from natsl.search.objective import CostContext, Objective, measure
from natsl.search.pareto import non_dominated
from natsl.search.question import Question, Queue
from natsl.search.rungs import Result, goes_on
from natsl.search.samplers import Sampler, make_sampler
from natsl.search.samplers.history import SHARE
from natsl.search.storage import FINGERPRINT, SHARED, THREADS, Identity, OpenStudy, open_study, reported_errors
from natsl.search.stored import (
    BATCH,
    EVALUATION,
    FAULT,
    INDEX,
    KNOWN,
    PARTS,
    POLICY,
    REASON,
    read_record,
    read_trials,
)
from natsl.search.trial import Proposal, Record, Work
from natsl.space.cost import LayerShape
from natsl.space.policy import Op, RoutingPolicy

Evaluate = Callable[[RoutingPolicy, float], Evaluation]  # a policy on a share of the sequences


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
        self._again: dict[int, dict[str, Any]] = {}  # parameters of the records that are to be tried again, by index
        self._made: list[Record] = []  # by this process
        self._open: list[Work] = []  # proposed and not told, in order
        self.stops: Callable[[], bool] = lambda: False  # asked before each proposal: whether there are to be no more
        if config.storage is not None:
            shared = {"launcher": config.launcher.value, "lease_seconds": config.lease_seconds}
            study.set_user_attr(SHARED, shared | {"batch_size": config.batch_size})
        self._told = -1  # Optuna's number of the latest record
        self.batch: int = self.fingerprint.get("batch", 1)
        remains = read_trials(study, self._read)
        self.cut_off, self.foreign = remains.cut_off, remains.foreign
        for trial in remains.running:  # its process is gone: this one owns the study
            self._adopt(trial)
        self._heartbeat = Heartbeat(opened)
        if config.storage is not None:
            self._heartbeat.start()

    def _read(self, trial: FrozenTrial) -> None:
        record = self._add(read_record(trial, self._names, len(self.records)))
        if record.transient:
            self._again[record.index] = trial.params

    def _adopt(self, trial: FrozenTrial) -> None:
        """Go on with a trial that a process has left; one that it had not proposed yet fails without a reason."""
        attributes, study = trial.user_attrs, self._study
        pending = {work.proposal.index for work in self._open}
        expected = [index for index in self._again if index not in pending] or [len(self.records) + len(pending)]
        index = attributes.get(INDEX)
        if POLICY not in attributes or BATCH not in attributes or index not in expected:
            study.tell(trial.number, state=TrialState.FAIL)
            self.cut_off += 1
            return
        if index >= max(self.config.n_trials, len(self.records)):
            return  # it is left to a search that wants so many
        study.sampler = RandomSampler()  # no draw is left
        policy = RoutingPolicy.from_dict(attributes[POLICY])
        known = self._by_digest.get(policy.digest())
        proposal = Proposal(optuna.Trial(study, trial._trial_id), index, policy, known, attributes[BATCH])
        self._open.append(Work(proposal))
        self.cut_off += 1

    @property
    def engine(self) -> Engine:
        """The database that it is in."""
        return self._opened.storage.engine

    @property
    def id(self) -> int:
        """Its number there."""
        return self._study._study_id

    def beat(self) -> None:
        """Show processes on other machines that this one works; ``UserError`` if the study is another one's by now."""
        self._heartbeat.beat()

    def threads(self, chosen: int) -> int:
        """How many threads evaluations have, as ``chosen`` when the first of them was made: sums depend on it."""
        stored = self._study.user_attrs.get(THREADS)
        if stored is None:
            self._study.set_user_attr(THREADS, chosen)
        return chosen if stored is None else int(stored)

    @property
    def remaining(self) -> int:
        """Trials that are still to be made, those that an earlier process has to leave to this one included."""
        return len(self._again) + max(0, self.config.n_trials - len(self.records))

    @property
    def _next(self) -> int | None:
        """The index of the next policy to be proposed (None: there is none)."""
        pending = {work.proposal.index for work in self._open}
        again = [index for index in self._again if index not in pending]
        if again or any(index < len(self.records) for index in pending):
            return min(again, default=None)
        index = len(self.records) + len(pending)
        return index if index < self.config.n_trials else None

    def propose(self, batch: int | None = None) -> Proposal:
        """The next policy: what is to be tried again, then the first ones, then what the sampler draws.

        Its draws depend on (seed, index, results so far, what is being evaluated). ``batch``: as in ``Proposal`` (null:
        it begins one).
        """
        index, problem = self._next, self.problem
        assert index is not None, "no trials are left"
        self._opened.check_owner()
        self._study.sampler = make_sampler(self.sampler, self.config.local_share, self.seed, index)
        params = self._again.get(index)
        if params is None and index < len(self.first):
            params = self.config.space.params(self.first[index], problem.kinds, problem.heads)
        if params is not None:
            self._study.enqueue_trial(params)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            trial = self._study.ask()
            policy = self.config.space.suggest(trial, problem.kinds, problem.chunk_size, problem.heads)
        batch = trial.number if batch is None else batch
        trial.set_user_attr(INDEX, index)
        trial.set_user_attr(BATCH, batch)
        describe_trial(trial, policy)
        trial.set_user_attr(POLICY, policy.to_dict())  # the last one: what has it is made by whoever finds it
        return Proposal(trial, index, policy, self._by_digest.get(policy.digest()), batch)

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
        trial.set_user_attr(KEPT, evaluation.kept_fraction)
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
        queue: Queue | None = None,
    ) -> None:
        """Make the remaining trials; what is cut off is left as it is, and the next process goes on with it.

        ``probe`` raises ``RuntimeError`` if the device is of no use any more; it is asked after a fault of the machine.
        ``queue``: of whoever ``evaluate`` asks. Raises ``SearchFailedError`` once too many trials have failed,
        ``DeviceLostError`` if the device is lost. Once ``stops`` says so, only what is open is finished.
        """
        queue = queue or Queue()
        self._check_failures()
        for work in self._open:
            self._ask_ahead(work, queue)
        while self.remaining:
            with reported_errors(self._opened.where):
                self._fill(queue)
                if not self._open:
                    return
                moved = False
                for work in list(self._open):
                    moved = self._advance(work, evaluate, probe, queue) or moved
                    while self._open and self._open[0].finished:
                        self._finish(on_record)
            if not moved:
                queue.wait()

    def _fill(self, queue: Queue) -> None:
        """Propose what may be proposed now: the rest of a batch, or as much as keeps the workers busy."""
        while (index := self._next) is not None and not self.stops():
            batch = None
            if self.config.synchronous and self._open:
                batch = self._open[-1].proposal.batch
                ends = index % self.batch == 0 if index >= len(self.records) else len(self._open) >= self.batch
                if ends or self._told >= batch:
                    return
            elif sum(not work.finished for work in self._open) >= self.batch:
                return
            work = Work(self.propose(batch))
            self._open.append(work)
            self._ask_ahead(work, queue)

    def _waits(self, work: Work) -> bool:
        """Whether the same policy comes before it in the batch: it has the result of that one."""
        before = (other.proposal for other in self._open[: self._open.index(work)])
        return any(other.policy == work.proposal.policy for other in before)

    def _ask_ahead(self, work: Work, queue: Queue) -> None:
        if not work.finished and work.proposal.known is None and not self._waits(work):
            queue.ahead([Question.search(work.proposal.policy, self.config.rungs[len(work.parts)])])

    def _advance(self, work: Work, evaluate: Evaluate, probe: Callable[[], None], queue: Queue) -> bool:
        """Judge a policy as far as answers are there, and say whether anything was new."""
        if work.finished or self._waits(work):
            return False
        moved = not work.begun
        if not work.begun:
            known = work.proposal.known or self._by_digest.get(work.proposal.policy.digest())
            if known is not None and not known.complete and work.proposal.index < len(self.first):
                known = None  # these are judged on everything
            work.proposal, work.begun = replace(work.proposal, known=known), True
            if known is not None:
                work.evaluation, work.parts, work.share = known.evaluation, known.parts, known.share
                work.reason = None if known.evaluation is not None else known.reason or ""
                work.finished = True
        while not work.finished:
            share = self.config.rungs[len(work.parts)]
            question = Question.search(work.proposal.policy, share)
            if not queue.ready(question):
                queue.ahead([question])
                return moved
            moved = True
            work.history = (*work.history, *queue.history(question))
            try:
                self._judge(work, evaluate, share)
            except PERMANENT as error:
                work.reason, work.finished = describe(error), True
            except TRANSIENT as error:
                check_machine(error, probe)
                work.reason, work.transient, work.finished = describe(error), True, True
        return moved

    def _judge(self, work: Work, evaluate: Evaluate, share: float) -> None:
        """Judge a policy on one more part, and decide whether more is worth it; the first policies go on always."""
        proposal = work.proposal
        evaluation = evaluate(proposal.policy, share)
        values, limited = self._measure(evaluation, proposal.policy)
        own = (*(values[name] for name in self._names), sum(max(0.0, value) for value in limited.values()))
        work.evaluation, work.share = evaluation, share
        work.parts = (*work.parts, own)
        work.finished = share == 1
        if share < 1 and proposal.index >= len(self.first):
            # those of its own batch are left out: who of them is evaluated first must not matter
            earlier = [item for item in self.records if item.same_as is None and item.number < proposal.batch]
            rung, rungs = len(work.parts) - 1, len(self.config.rungs)
            same = [item.parts[rung] for item in earlier if len(item.parts) > rung]
            complete = [item.parts[-1] for item in earlier if len(item.parts) == rungs]
            work.finished = not goes_on(own, same, complete)

    def _finish(self, on_record: Callable[[Record], None] | None) -> None:
        """Store the outcome of the first of the open trials."""
        self._opened.check_owner()
        work = self._open[0]
        if work.history:
            work.proposal.trial.set_user_attr(HISTORY, work.history)
        if work.reason is None and work.evaluation is not None:
            record = self.tell(work.proposal, work.evaluation, work.parts, work.share)
        else:
            record = self.fail(work.proposal, work.reason or "", work.transient)
        del self._open[0]
        record = replace(record, history=work.history)
        self._made.append(record)
        if on_record is not None:
            on_record(record)
        self._check_failures()

    def _check_failures(self) -> None:
        """Failures of policies count for the whole study, all failures for the process that saw them."""
        for records in ([record for record in self.records if not record.transient], self._made):
            check_failures([item.reason for item in records if item.reason is not None], len(records), self.config)

    def close(self) -> None:
        """Give the study up: only ``records`` can be used afterwards."""
        self._heartbeat.close()
        self._opened.close()

    def front(self) -> list[Record]:
        """Records that keep all constraints and that no other dominates, in order of their index."""
        good = [(record, record.result) for record in self.records if record.result is not None]
        return [good[i][0] for i in non_dominated([values for _, values in good], self._names)]

    def _add(self, record: Record) -> Record:
        self.records[record.index : record.index + 1] = [record]
        self._told = max(self._told, record.number)
        self._again.pop(record.index, None)  # also if it failed: the next try is another process's
        if not record.transient:
            self._by_digest.setdefault(record.policy.digest(), record)
        return record


def open_policy_study(
    path: Path,
    name: str,
    config: SearchConfig,
    problem: Problem,
    seed: int,
    made_from: Mapping[str, Any],
    workers: int = 1,
) -> PolicyStudy:
    """The study of a run, new or resumed.

    path: the SQLite file, unless ``config.storage`` names a database. made_from: what else the trials depend on (model,
    data, checkpoint), compared on resume. workers: how many there are, which the batches of a new study follow. Raises
    ``UserError`` if the storage is damaged, foreign or belongs to other settings.
    """
    fingerprint = fingerprint_of(config, problem, seed, made_from, workers)
    identity = Identity(name, [item.direction for item in problem.objectives], fingerprint)
    opened = open_study(path, config.storage, identity)
    try:
        with reported_errors(opened.where):
            introduce(opened.study, [item.name for item in problem.objectives], config.constraints)
            return PolicyStudy(opened, config, problem, seed)
    except BaseException:
        opened.close()
        raise


def fingerprint_of(
    config: SearchConfig, problem: Problem, seed: int, made_from: Mapping[str, Any], workers: int
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """What a study depends on, given what it did when it was made ({}: it is new); arguments as of a study."""

    def fingerprint(stored: Mapping[str, Any]) -> dict[str, Any]:
        """What is left to us, the number of anchors and the batch, is chosen once, when the study is made."""
        count = first_count(config, problem.given)
        if stored and config.anchors is None:
            count = len(stored.get("first", ()))
        batch = config.batch or (stored.get("batch", 1) if stored else _batch(config, workers))
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
            **({} if batch == 1 else {"batch": batch}),
            **({} if config.synchronous else {"synchronous": False}),
            **made_from,
        }

    return fingerprint


def _batch(config: SearchConfig, workers: int) -> int:
    """How many trials of a new study are evaluated at a time; with several workers none of them waits for long."""
    return 1 if workers == 1 else (4 if config.synchronous else 2) * workers


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
