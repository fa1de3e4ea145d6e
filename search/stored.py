"""What a study holds of the trials that earlier calls have made: their attributes, read back as records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import optuna
from optuna.trial import FrozenTrial, TrialState

from natsl.evaluate import Evaluation
from natsl.search.fault import was_transient
from natsl.search.samplers.history import SHARE
from natsl.search.trial import Record
from natsl.space.policy import RoutingPolicy

# Trial attributes. A trial that failed has a reason; a failed trial without one was cut off and counts for nothing.
POLICY, EVALUATION, REASON, KNOWN = "policy", "evaluation", "reason", "same_as"
FAULT = "transient"  # whether the reason is a fault of the machine
PARTS = "parts"  # results of a trial on growing parts of the sequences, the last one that of its values
INDEX = "index"  # which record a trial makes; older trials that a sampler has drawn do not say it
BATCH = "batch"  # Optuna's number of the first trial that was proposed from the same results


@dataclass
class Remains:
    """What a study holds beside records: trials that a process has left ``running``, how many were ``cut_off``.

    ``foreign``: Optuna's numbers of trials that something else put into it.
    """

    running: list[FrozenTrial] = field(default_factory=list)
    foreign: list[int] = field(default_factory=list)
    cut_off: int = 0


def read_trials(study: optuna.Study, read: Callable[[FrozenTrial], None]) -> Remains:
    """Have each finished trial ``read``, in order, and return the rest; only the owner of a study may do so.

    ``read`` raises ``KeyError``, ``TypeError`` or ``ValueError`` for a trial that is not one of ours. Trials that a
    process has put into the study and ended before it asked for them fail.
    """
    while study.get_trials(False, (TrialState.WAITING,)):
        study.tell(study.ask(), state=TrialState.FAIL)
    remains = Remains()
    for trial in study.get_trials(deepcopy=False):
        if trial.state is TrialState.RUNNING:
            remains.running.append(trial)
        elif trial.state is TrialState.FAIL and REASON not in trial.user_attrs:
            remains.cut_off += 1
        else:
            try:
                read(trial)
            except (KeyError, TypeError, ValueError):
                remains.foreign.append(trial.number)
    return remains


def read_record(trial: FrozenTrial, names: Sequence[str], made: int) -> Record:
    """The record of a finished trial of a search for policies; errors as ``read`` of ``read_trials``.

    ``names``: of the objectives. ``made``: how many records come before it.
    """
    attributes = trial.user_attrs
    policy = RoutingPolicy.from_dict(attributes[POLICY])
    index = attributes.get(INDEX, made)
    if not 0 <= index <= made:
        raise ValueError(f"there is no record {index}")
    if trial.state is TrialState.FAIL:
        reason = attributes[REASON]
        transient = attributes.get(FAULT, was_transient(reason))
        return Record(index, trial.number, policy, None, None, False, reason, transient=transient)
    return Record(
        index,
        trial.number,
        policy,
        dict(zip(names, trial.values, strict=True)),
        Evaluation.from_dict(attributes[EVALUATION]),
        feasible=all(value <= 0 for value in trial.constraints.values()),
        same_as=attributes.get(KNOWN),
        parts=tuple(map(tuple, attributes.get(PARTS, ()))),
        share=attributes.get(SHARE, 1.0),
    )
