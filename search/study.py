"""The trials of a search: propose a policy, have it evaluated, tell the result. Cut off anywhere, it resumes."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, NSGAIIISampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from natsl.evaluate import Evaluation
from natsl.run import UserError
from natsl.search.config import Sampler, SearchConfig
from natsl.search.objective import CostContext, Objective, measure
from natsl.search.pareto import Scale, non_dominated
from natsl.search.storage import FINGERPRINT, Identity, open_study
from natsl.space.policy import Op, RoutingPolicy

# Trial attributes. A trial that failed has a reason; a failed trial without one was cut off and counts for nothing.
POLICY, EVALUATION, REASON, KNOWN = "policy", "evaluation", "reason", "same_as"

_POPULATION = 20
_STARTUP = 16

# Trials near the knee: how many points of the front they start from, the share of them that fill a gap between two
# points, the chance to switch an op, and how far numbers move (powers of 10, as a share of their range).
_PARENTS = 8
_BETWEEN = 0.5
_SWITCH = 0.1
_STEP = (-2.3, -1.0)

Evaluate = Callable[[RoutingPolicy], Evaluation]


class SearchFailedError(UserError):
    """Too many trials failed for the search to go on."""


@dataclass(frozen=True)
class Record:
    """One finished trial. ``index`` counts finished trials from 0; ``number`` is Optuna's, cut-off trials included.

    ``values`` and ``evaluation`` are null if it failed, and ``reason`` says why. ``feasible``: keeps all constraints.
    ``same_as``: index of the earlier trial of the same policy whose result was used.
    """

    index: int
    number: int
    policy: RoutingPolicy
    values: dict[str, float] | None
    evaluation: Evaluation | None
    feasible: bool
    reason: str | None = None
    same_as: int | None = None

    @property
    def result(self) -> dict[str, float] | None:
        """The values if they may be part of a front (null: failed, or breaks a constraint)."""
        return self.values if self.feasible else None

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
    """What is searched: the layers of the model, what cost is counted for, what is wanted, what is tried first."""

    kinds: tuple[Op, ...]
    chunk_size: int
    costs: CostContext
    objectives: tuple[Objective, ...]
    first: tuple[RoutingPolicy, ...]


class PolicyStudy:
    """A study over routing policies. One process writes to it at a time."""

    def __init__(self, study: optuna.Study, config: SearchConfig, problem: Problem, seed: int) -> None:
        self.fingerprint: dict[str, Any] = study.user_attrs[FINGERPRINT]
        self.config = config
        self.problem = problem
        self.seed = seed
        self._study = study
        self._names = [item.name for item in problem.objectives]
        self.records: list[Record] = []
        self._by_digest: dict[str, Record] = {}
        self.cut_off = 0
        for trial in study.get_trials(deepcopy=False):
            if trial.state is TrialState.RUNNING:
                study.tell(trial.number, state=TrialState.FAIL)  # its process is gone: this one holds the run
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL)):
            record = self._read(trial)
            if record is None:
                self.cut_off += 1
            else:
                self._add(record)

    @property
    def remaining(self) -> int:
        """Trials that are still to be made."""
        return max(0, self.config.n_trials - len(self.records))

    def propose(self) -> Proposal:
        """The next policy: one of the first ones, else what the sampler draws from (seed, index, results so far)."""
        index = len(self.records)
        self._study.sampler = make_sampler(self.config.sampler, self.seed, index)
        # Outside an interrupted call nothing waits; what waits was put there for this very index.
        if not self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            if index < len(self.problem.first):
                self._study.enqueue_trial(self.config.space.params(self.problem.first[index], self.problem.kinds))
            elif int((index + 1) * self.config.local_share) > int(index * self.config.local_share):
                self._study.enqueue_trial(self._near_knee(index))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            trial = self._study.ask()
            policy = self.config.space.suggest(trial, self.problem.kinds, self.problem.chunk_size)
        trial.set_user_attr(POLICY, policy.to_dict())
        return Proposal(trial, index, policy, self._by_digest.get(policy.digest()))

    def tell(self, proposal: Proposal, evaluation: Evaluation) -> Record:
        """Store a result; objectives that are missing or not finite make the trial fail."""
        try:
            bounds = self.config.constraints
            values = measure(self._names, evaluation, proposal.policy, self.problem.costs)
            limited = measure(list(bounds), evaluation, proposal.policy, self.problem.costs)
        except FloatingPointError as error:
            return self.fail(proposal, str(error))
        trial = proposal.trial
        trial.set_user_attr(EVALUATION, asdict(evaluation))
        if proposal.known is not None:
            trial.set_user_attr(KNOWN, proposal.known.index)
        for name, value in limited.items():
            trial.set_constraint(name, value - bounds[name])
        self._study.tell(trial, [values[name] for name in self._names])
        feasible = all(value <= bounds[name] for name, value in limited.items())
        same = None if proposal.known is None else proposal.known.index
        return self._add(
            Record(proposal.index, trial.number, proposal.policy, values, evaluation, feasible, same_as=same)
        )

    def fail(self, proposal: Proposal, reason: str) -> Record:
        """Store that a policy could not be evaluated, and why."""
        proposal.trial.set_user_attr(REASON, reason)
        self._study.tell(proposal.trial, state=TrialState.FAIL)
        return self._add(Record(proposal.index, proposal.trial.number, proposal.policy, None, None, False, reason))

    def run(self, evaluate: Evaluate, on_record: Callable[[Record], None] | None = None) -> None:
        """Make the remaining trials; ``SearchFailedError`` once too many of them have failed."""
        self._check_failures()
        while self.remaining:
            proposal = self.propose()
            record = self._evaluate(proposal, evaluate)
            if on_record is not None:
                on_record(record)
            self._check_failures()

    def _evaluate(self, proposal: Proposal, evaluate: Evaluate) -> Record:
        known = proposal.known
        if known is not None and known.evaluation is not None:
            return self.tell(proposal, known.evaluation)
        if known is not None:
            return self.fail(proposal, known.reason or "")
        try:
            return self.tell(proposal, evaluate(proposal.policy))
        except (ArithmeticError, MemoryError, RuntimeError, ValueError) as error:
            text = " ".join(str(error).split())[:300]
            kind = "" if isinstance(error, FloatingPointError) else f"{type(error).__name__}: "
            return self.fail(proposal, kind + text)
        except BaseException:
            # Interrupted: no reason is stored, so that the same index is proposed again on resume.
            self._study.tell(proposal.trial, state=TrialState.FAIL)
            raise

    def _check_failures(self) -> None:
        failed = [record for record in self.records if record.reason is not None]
        limit = self.config.max_failure_rate
        if len(failed) >= self.config.min_failures and len(failed) > limit * len(self.records):
            raise SearchFailedError(
                f"{len(failed)} of {len(self.records)} trials failed, more than search.max_failure_rate = {limit:g}; "
                f"the last one: {failed[-1].reason}"
            )

    def _near_knee(self, index: int) -> dict[str, Any]:
        """Parameters of a new policy near the knee: between two neighbours on the front, or beside one of its points.

        A sampler spreads its trials over all of the front; most users want a policy from around the knee.
        """
        random = Random(_seed(self.seed, index))
        values = [record.values for record in self.records if record.values is not None]
        front = self.front()
        if not front:
            return {}
        ends = [[f(item[name] for item in values) for name in self._names] for f in (min, max)]
        scaled = Scale(tuple(self._names), tuple(ends[0]), tuple(ends[1])).apply([r.values or {} for r in front])
        best = np.argsort(scaled.sum(axis=1), kind="stable")[:_PARENTS].tolist()
        trials = self._study.get_trials(deepcopy=False)
        parent = trials[front[random.choice(best)].number]
        if random.random() < _BETWEEN:
            order = np.argsort(scaled[:, random.randrange(len(self._names))], kind="stable").tolist()
            pairs = [(i, j) for i, j in pairwise(order) if i in best or j in best]
            gaps = [float(np.abs(scaled[i] - scaled[j]).sum()) for i, j in pairs]
            if sum(gaps) > 0:
                i, j = random.choices(pairs, gaps)[0]
                first, second = (trials[front[k].number] for k in (i, j))
                mixed = _between(first, second, random.random())
                if mixed is not None:
                    return mixed
        return _beside(parent, random)

    def front(self) -> list[Record]:
        """Records that keep all constraints and that no other dominates, in order of their index."""
        good = [(record, record.result) for record in self.records if record.result is not None]
        return [good[i][0] for i in non_dominated([values for _, values in good], self._names)]

    def _add(self, record: Record) -> Record:
        self.records.append(record)
        self._by_digest.setdefault(record.policy.digest(), record)
        return record

    def _read(self, trial: FrozenTrial) -> Record | None:
        attributes = trial.user_attrs
        if trial.state is TrialState.FAIL and REASON not in attributes:
            return None
        policy = RoutingPolicy.from_dict(attributes[POLICY])
        index = len(self.records)
        if trial.state is TrialState.FAIL:
            return Record(index, trial.number, policy, None, None, False, attributes[REASON])
        values = dict(zip(self._names, trial.values, strict=True))
        feasible = all(value <= 0 for value in trial.constraints.values())
        evaluation = read_evaluation(attributes[EVALUATION])
        return Record(index, trial.number, policy, values, evaluation, feasible, same_as=attributes.get(KNOWN))


def open_policy_study(
    path: Path, name: str, config: SearchConfig, problem: Problem, seed: int, made_from: Mapping[str, Any]
) -> PolicyStudy:
    """The study of a run, new or resumed.

    path: the SQLite file, unless ``config.storage`` names a database. made_from: what else the trials depend on (model,
    data, checkpoint), compared on resume. Raises ``UserError`` if the storage is damaged, foreign or belongs to other
    settings.
    """
    fingerprint = {
        "objectives": {item.name: item.direction for item in problem.objectives},
        "constraints": config.constraints,
        "context": config.context,
        "space": config.space.fingerprint(),
        "first": [policy.digest() for policy in problem.first],
        "seed": seed,
        "sampler": config.sampler.value,
        "local_share": config.local_share,
        **made_from,
    }
    identity = Identity(name, [item.direction for item in problem.objectives], fingerprint)
    return PolicyStudy(open_study(path, config.storage, identity), config, problem, seed)


def first_policies(
    config: SearchConfig, kinds: Sequence[Op], chunk_size: int, given: Sequence[RoutingPolicy]
) -> tuple[RoutingPolicy, ...]:
    """What is tried before the sampler draws: the user's policies, then the anchors of the space, each once.

    Raises ``ValueError`` if one of the user's does not fit the model or is outside the space.
    """
    for policy in given:
        policy.check(kinds, chunk_size)
        config.space.params(policy, kinds)
    policies = {policy.digest(): policy for policy in (*given, *config.space.anchors(kinds, chunk_size))}
    return tuple(policies.values())


def make_sampler(sampler: Sampler, seed: int, index: int) -> BaseSampler:
    """A sampler whose draws depend on (seed, index) and the results so far, never on how often it was resumed."""
    number = _seed(seed, index)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        match sampler:
            case Sampler.tpe:
                return TPESampler(seed=number, multivariate=True, group=True, n_startup_trials=_STARTUP)
            case Sampler.nsga2:
                return NSGAIISampler(seed=number, population_size=_POPULATION)
            case Sampler.nsga3:
                return NSGAIIISampler(seed=number, population_size=_POPULATION)
            case Sampler.random:
                return RandomSampler(seed=number)


def _between(first: FrozenTrial, second: FrozenTrial, share: float) -> dict[str, Any] | None:
    """Parameters on the line from one trial to another; None unless they choose the same ops and differ in numbers."""
    params = {}
    if first.params.keys() != second.params.keys():
        return None
    for name, distribution in first.distributions.items():
        a, b = first.params[name], second.params[name]
        if isinstance(distribution, FloatDistribution):
            params[name] = a + share * (b - a)
        elif a == b:
            params[name] = a
        else:
            return None
    return params if params != first.params else None


def _beside(parent: FrozenTrial, random: Random) -> dict[str, Any]:
    """Parameters of a trial with some numbers moved a little, and now and then an op switched."""
    numbers = {k: d for k, d in parent.distributions.items() if isinstance(d, FloatDistribution)}
    choices = {k: d for k, d in parent.distributions.items() if isinstance(d, CategoricalDistribution)}
    params = dict(parent.params)
    if choices and (not numbers or random.random() < _SWITCH):
        name = random.choice(sorted(choices))
        params[name] = random.choice(choices[name].choices)
    step = 10 ** random.uniform(*_STEP)
    for name, d in numbers.items():
        if random.random() < 0.5 or len(numbers) == 1:
            moved = params[name] + random.gauss(0.0, step) * (d.high - d.low)
            params[name] = min(max(moved, d.low), d.high)
    return params


def _seed(seed: int, index: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:4], "big")


def read_evaluation(plain: Mapping[str, Any]) -> Evaluation:
    """The inverse of ``dataclasses.asdict`` for an evaluation read from JSON."""
    values = dict(plain)
    values["kept_by_layer"] = tuple(values["kept_by_layer"])
    values["kept_by_head"] = tuple(tuple(heads) for heads in values["kept_by_head"])
    return Evaluation(**values)
