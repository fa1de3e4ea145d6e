"""Which options of a run may change when it is resumed; all others are refused with the difference. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from natsl.config import OLDER_MODEL, OLDER_TRAIN
from natsl.errors import UserError
from natsl.files import read_config, to_plain
from natsl.run import Run
from natsl.secrets import MASK, redact, redact_text
from natsl.tasks import NEWER

# Options and whole sections that a resumed run honours. Nothing else may change.
FREE_ON_RESUME = (
    "name",  # says only where the run is
    "root",
    "device",
    "export",
    "allow_other_data",
    "tracking",
    "data.path",  # the text itself is compared, by its contents
    "search.policies",  # compared by their contents
    "pick",  # so is the policy of a specialisation, however it was named
    "policy",
    "search.sampler",  # the study compares it with its own
    "search.anchors",  # null keeps the study's, which compares any other
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.log_every",
    "train.max_bad_steps",
    "search.n_trials",
    "search.max_hours",
    "search.batch_size",
    "search.max_failure_rate",
    "search.min_failures",
    "search.random_draws",
    "search.uniform_budgets",
    "search.lengths",
    "search.launcher",
    "search.slurm",
    "search.workers",
    "search.batch",  # null keeps the study's, which compares any other
    "search.trial_timeout",
    "search.lease_seconds",
    "outer.n_trials",
)
# What only the report depends on: it is made again if they change.
REPORT_OPTIONS = frozenset({"search.random_draws", "search.uniform_budgets", "search.lengths"})


def check_resume(run: Run, config: Any) -> frozenset[str]:
    """Compare the options of a command with those that its run was made under; returns the names that have changed.

    A run that has stored nothing yet takes the new options: ``config.yaml`` is written. Raises ``UserError`` if an
    option differs that a resumed run cannot honour, or if it is an outer search and the command is another.
    """
    begun = any(run.supernet.glob("step-*.json")) or run.study_db.exists() or run.trials.is_dir()
    if not run.config.exists() or not begun:
        run.write_config(config)
        return frozenset()
    stored = read_config(run.config)
    if "outer" in stored and not hasattr(config, "outer"):
        raise UserError(
            f"name = {run.name!r} is an outer search: choose another name, or one of its trials, as "
            f"root={run.trials} name={run.best_trial()}"
        )
    changes = {name: values for name, *values in differences("", stored, config, type(config)())}
    if getattr(config, "supernet_from", None) is not None:  # these come from the supernet, whatever was given
        changes = {name: values for name, values in changes.items() if name.split(".")[0] not in _OF_SUPERNET}
    refused = [
        f"{name}: {old!r} then, {new!r} now" for name, (old, new) in changes.items() if not is_free_on_resume(name)
    ]
    of_search = all(name.startswith("search.") or is_free_on_resume(name) for name in changes)
    if refused:
        raise UserError(
            redact_text(
                f"the run {run.name!r} was made under other settings ({', '.join(refused)}): "
                f"restore them or choose another name{_ANEW if of_search else ''}"
            )
        )
    return frozenset(changes)


_ANEW = " (supernet_from=<this run> searches its supernet anew)"
_SECTIONS = {"model": OLDER_MODEL, "train": OLDER_TRAIN}
_OF_SUPERNET = ("model", "train", "supernet")
_OLDER = (
    {f"data.{task}.{name}": value for (task, name), value in NEWER.items()}
    | {f"{section}.{name}": value for section, older in _SECTIONS.items() for name, value in older.items()}
    | {"search.rungs": [1.0]}
)


def is_free_on_resume(name: str) -> bool:
    """Whether a resumed run honours a new value of the option ``name``."""
    return any(name == free or name.startswith(f"{free}.") for free in FREE_ON_RESUME)


def differences(
    prefix: str, stored: Mapping[str, Any], config: Any, defaults: Any
) -> Iterator[tuple[str, object, object]]:
    """Name, stored and present value of every option that differs. What an older version did not store was the default.

    (Or what ``_OLDER`` says, where today's default is another.)
    A section that is not stored belongs to another command: the search that goes on from a training adds its own.
    """
    for item in fields(config):
        name, value, default = f"{prefix}{item.name}", getattr(config, item.name), getattr(defaults, item.name)
        if is_dataclass(value):
            section = stored.get(item.name, {} if prefix else None)
            if isinstance(section, Mapping):
                yield from differences(f"{name}.", section, value, default)
            continue
        old, new = stored.get(item.name, _OLDER.get(name, to_plain(default))), to_plain(value)
        if old not in (new, redact(new)) and MASK not in str(old):  # a secret is not stored
            yield name, old, new
