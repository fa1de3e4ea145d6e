"""What a study tells people who open it with Optuna's own tools, such as optuna-dashboard; no search reads it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence

import optuna
from optuna.exceptions import ExperimentalWarning

from natsl.search.objective import OBJECTIVES
from natsl.space.policy import Op, RoutingPolicy

# Attributes of a trial that are only shown.
TEXT, OPS, KEPT = "policy_text", "ops", "kept_fraction"
HISTORY = "history"  # what went wrong with its workers
# Study attributes of optuna-dashboard: a note, in pieces of at most 2,045 characters, and how often it was changed.
_NOTE_VERSION, _NOTE_PIECE, _PIECE_LENGTH = "dashboard:note_ver", "dashboard:note_str:", 2_000


def introduce(study: optuna.Study, names: Sequence[str], constraints: Mapping[str, float]) -> None:
    """Give a study the names of its objectives and a note that explains its trials, unless it has them.

    Neither is part of its fingerprint; a note that somebody has edited stays.
    """
    storage, number = study._storage, study._study_id
    attributes = storage.get_study_system_attrs(number)
    if study.metric_names is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names(list(names))
    if _NOTE_VERSION not in attributes:
        text = note(study.study_name, names, constraints)
        for i, first in enumerate(range(0, len(text), _PIECE_LENGTH)):
            storage.set_study_system_attr(number, f"{_NOTE_PIECE}{i}", text[first : first + _PIECE_LENGTH])
        storage.set_study_system_attr(number, _NOTE_VERSION, 1)  # the last one: what has it is whole


def note(name: str, names: Sequence[str], constraints: Mapping[str, float]) -> str:
    """What the trials of a study are, in Markdown."""
    wanted = [f"- `{item}`: {OBJECTIVES[item].label}, {OBJECTIVES[item].direction}" for item in names]
    bounds = [f"- `{item}` ≤ {bound:g}: {OBJECTIVES[item].label}" for item, bound in constraints.items()]
    return "\n".join(
        [
            f"# natsl search {name}",
            "A trial is one routing policy of a trained supernet, evaluated on held-out sequences; nothing is trained.",
            "",
            "**Objectives**",
            *wanted,
            *(["", "**Constraints**", *bounds] if bounds else []),
            "",
            "**Attributes of a trial**",
            f"- `{TEXT}`: an item per layer. `D`: the delta rule only; `S`: softmax keeps every chunk; `.25`: the "
            "router keeps a quarter of the chunks; `[.1,0]`: a budget for each head; `θ1.5`: chunks whose margin is "
            "above 1.5; `≤.3+2`: never more than this share and 2 chunks; `/2`: the mix's logits are divided by 2",
            f"- `{OPS}`: how many layers do what",
            f"- `{KEPT}`: the share of the chunks that was kept, as measured",
            "- `share`: judged on this part of the sequences only, and not part of the front, though plots and best "
            "trials here count it",
            "- `same_as`: the trial of the same policy whose result it has, counted from 0 without trials that were "
            "cut off; `index` is a trial's own number there",
            "- `reason`: why it failed; a failed trial without one was cut off and counts for nothing",
            f"- `{HISTORY}`: what went wrong with its workers before its result came",
            "- `policy`, `evaluation`, `parts`, `batch`: what a resumed search reads back: leave them as they are",
            "",
            "**Parameters**: `u.<layer>` or `u.<layer>.<head>` is one number from delta only (its low end) to softmax "
            "(its high end), between them the router's budget or threshold; `mix.<layer>` divides the mix's logits.",
        ]
    )


def describe_trial(trial: optuna.Trial, policy: RoutingPolicy) -> None:
    """Give a trial attributes that say what its policy does."""
    counts = Counter(layer.op for layer in policy.layers)
    trial.set_user_attr(TEXT, policy.describe())
    trial.set_user_attr(OPS, ", ".join(f"{counts[op]} {op.value}" for op in Op if counts[op]))
