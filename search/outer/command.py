"""The command ``natsl outer``: supernets under other training settings, one after another. No torch at import.

A supernet that is trained is never trained again, one that was cut off goes on from its checkpoint: the same command
again makes what is missing. The best one ends as a run of ``natsl search``.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import math
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from natsl.command import changed_options, option_line
from natsl.config import TRAINING_VERSION, ModelConfig
from natsl.device import resolve_device
from natsl.errors import UserError
from natsl.files import child_folder, to_plain, user_path, write_json
from natsl.resume import check_resume, is_free_on_resume
from natsl.run import Run
from natsl.search.outer.config import OuterRunConfig, shown_settings
from natsl.secrets import redact_text
from natsl.tracking import Tracker, start_tracker

if TYPE_CHECKING:
    import torch

    from natsl.data import TaskData
    from natsl.search.config import SearchRunConfig
    from natsl.search.outer.report import OuterResult
    from natsl.search.outer.study import OuterRecord, OuterStudy, OuterTrial
    from natsl.search.pareto import Scale
    from natsl.search.study import Problem

_LOG = logging.getLogger(__name__)
_END = "trial.json"  # in the folder of a trial: how it ended


@dataclass(frozen=True)
class Prepared:
    """What an outer search is made of.

    ``root``: of its trials. ``problems``: what is asked of a supernet, by its structure. ``rungs``: steps after which
    supernets are judged.
    """

    root: str
    problems: list[tuple[ModelConfig, Problem]]
    scale: Scale
    data: TaskData
    rungs: list[int]


def prepare_outer(config: OuterRunConfig) -> Prepared:
    """What an outer search is made of; ``UserError`` for what the user has to fix. Writes nothing."""
    from natsl.search.outer.value import common_scale
    from natsl.search.prepare import make_problem, prepare
    from natsl.search.rungs import useful

    root = str(Run(child_folder(user_path(config.root, "root"), config.name, "name")).trials)
    structures = [config.trial("t0000", root, settings) for settings in config.outer.space.structures()]
    scale = common_scale(structures)
    problems = [(item.model, make_problem(item)) for item in structures]
    data, steps = prepare(structures[0])[2], config.train.steps
    rungs = [max(1, math.ceil(share * steps)) for share in useful(config.outer.rungs, steps)]
    return Prepared(root, problems, scale, data, rungs)


def run_outer(config: OuterRunConfig) -> None:
    """Make an outer search, or what is missing of it, and print its trials and what to do with the best one."""
    from natsl.search.outer.report import print_result

    print_result(search_settings(config))


def search_settings(config: OuterRunConfig) -> OuterResult:
    """Make an outer search, or what is missing of it; ``UserError`` for what the user has to fix."""
    device = resolve_device(config.device)
    from natsl import __version__
    from natsl.search.outer.report import OuterResult, write
    from natsl.search.outer.study import open_outer_study
    from natsl.search.storage import check_connection, reported_errors

    parts = prepare_outer(config)
    if config.search.storage is not None:
        check_connection(config.search.storage)
    run = Run.open(config.name, config.root)
    with run.lock():
        if run.front_json.exists() or any(run.supernet.glob("step-*.json")):
            raise UserError(f"name = {config.name!r} is a run with a supernet of its own: choose another name")
        check_resume(run, config)
        made_from = {"natsl": __version__, **_made_from(config, parts)}
        with contextlib.closing(open_outer_study(run.study_db, config, parts.rungs, made_from)) as study:
            run.write_config(config)
            with start_tracker(config.tracking, run, to_plain(config)) if study.remaining else Tracker() as tracker:
                with reported_errors(str(run.study_db) if config.search.storage is None else "search.storage"):
                    _Outer(config, run, parts, device, tracker).make(study)
                space, rungs = config.outer.space, tuple(parts.rungs)
                result = OuterResult(run, space, parts.scale, rungs, tuple(study.records), _notes(study)).tested()
                write(result)
                tracker.image("outer/picture", run.path / "outer.png")
                tracker.html("outer/report", run.report)
        best = result.best
        if best is None:
            last = next((record.reason for record in reversed(result.records) if record.reason), "none was begun")
            raise UserError(f"no trial of {config.name!r} was trained to its end; the last failure: {last}")
        from natsl.search.pipeline import run_search

        if result.test is None:
            _LOG.info("the policies of the best trial, %s, are searched: %s", best.id, shown_settings(best.settings))
        trial = config.trial(best.id, parts.root, best.settings)
        run_search(trial, search_options(trial))
        result = result.tested()
        write(result)
    return result


def _made_from(config: OuterRunConfig, parts: Prepared) -> dict[str, Any]:
    """What the trials depend on beside their settings, as the study stores it."""
    from natsl.search.outer.value import fixed_policies

    judged = [policy.digest() for _, problem in parts.problems for policy in fixed_policies(problem, config.search)]
    plain, search = to_plain(config), config.search
    searched = {option for option, *_ in config.outer.space.axes()}
    sections = {
        section: {
            name: value
            for name, value in plain[section].items()
            if not is_free_on_resume(f"{section}.{name}") and f"{section}.{name}" not in searched
        }
        for section in ("model", "supernet", "train")
    }
    return {
        "outer": {"space": plain["outer"]["space"], "keep": config.outer.keep, "rungs": parts.rungs},
        "seed": config.seed,
        "objectives": search.objectives,
        "constraints": search.constraints,
        "context": search.context,
        "policies": hashlib.sha256(" ".join(judged).encode()).hexdigest()[:16],
        "data": parts.data.fingerprint,
        "training": TRAINING_VERSION,
        **sections,
    }


def _notes(study: OuterStudy) -> tuple[str, ...]:
    if not study.foreign:
        return ()
    numbers = ", ".join(map(str, study.foreign[:5])) + (", ..." if len(study.foreign) > 5 else "")
    return (f"trials of the study that natsl did not make are skipped: {numbers}",)


@dataclass(frozen=True)
class _Outer:
    """The trials of one outer search."""

    config: OuterRunConfig
    run: Run
    parts: Prepared
    device: torch.device
    tracker: Tracker

    def make(self, study: OuterStudy) -> None:
        """Make the trials that remain; ``SearchFailedError`` once too many have failed."""
        for record in study.records:
            if record.same_as is None and not (self.run.trials / record.id).is_dir():
                raise UserError(
                    f"{self.run.trials} has no trial {record.id}: the trials of this study are in another root; give "
                    "that, or choose another name"
                )
            self._mark(record)  # the process was killed before it did
        study.check_failures()
        while study.remaining:
            trial = study.next()
            known = study.known(trial)
            record = study.copy(trial, known) if known is not None else self._make(study, trial)
            self._show(study, record)
            study.check_failures()

    def _make(self, study: OuterStudy, trial: OuterTrial) -> OuterRecord:
        """Train and judge a supernet rung by rung, from wherever it was cut off."""
        from natsl.heldout import keep_record

        root = str(self.run.trials)
        config = self.config.trial(trial.id, root, trial.settings)
        run = Run.open(trial.id, root)
        _LOG.info("trial %s: %s", trial.id, shown_settings(trial.settings))
        reason: str | None = None
        with run.lock():
            check_resume(run, config)
            (run.path / _END).unlink(missing_ok=True)  # of the failure after which it is tried again
            keep_record(run, self.parts.data, root, None, config.allow_other_data)
            try:
                while len(trial.values) < len(self.parts.rungs) and not study.stops(trial):
                    self._judge(study, trial, config, run)
            except Exception as error:
                reason = failure(error)
                if reason is None:
                    raise
            record = study.finish(trial) if reason is None else study.fail(trial, reason)
            self._mark(record)
        if reason is not None:
            self._free()
        return record

    def _mark(self, record: OuterRecord) -> None:
        """Say in the folder of a trial how it ended."""
        path = self.run.trials / record.id / _END
        if record.same_as is None and not path.exists():
            options = search_options(self.config.trial(record.id, str(self.run.trials), record.settings))
            again = shlex.join(["natsl", "search", *options])  # trains it to the end, and searches its policies
            plain = {"outer": self.run.name, **record.to_plain(self.parts.rungs)}
            write_json(path, {**plain, "command": redact_text(again)})

    def _judge(self, study: OuterStudy, trial: OuterTrial, config: SearchRunConfig, run: Run) -> None:
        """Train up to the next rung and store what the supernet is worth there."""
        from natsl.calibrate import calibrate
        from natsl.search.outer.value import judge
        from natsl.train import TrainRecipe, fit

        step = self.parts.rungs[len(trial.values)]
        recipe = TrainRecipe(config.train, config.supernet, config.seed)
        model = fit(run, config.model, self.parts.data, recipe, self.device, Tracker(), until=step)
        if step < config.train.steps:  # else it is calibrated
            calibrate(model, self.parts.data, config.supernet, config.seed)
        problem = next(problem for model_config, problem in self.parts.problems if model_config == config.model)
        points = judge(model, self.parts.data, problem, config.search)
        study.report(trial, self.parts.scale.hypervolume([item.values for item in points]), points)

    def _free(self) -> None:
        """Give back what a supernet that did not fit has left on the device."""
        gc.collect()
        if self.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()

    def _show(self, study: OuterStudy, record: OuterRecord) -> None:
        """One finished trial in the log, in the tracker and on the terminal."""
        from natsl.search.outer.study import best_of

        best = best_of(study.records)
        self.run.log({"event": "trial", **record.to_plain(self.parts.rungs)})
        numbers: dict[str, Any] = {} if record.value is None else {"value": record.value}
        numbers |= {} if best is None else {"best": best.value}
        self.tracker.log({f"outer/{key}": value for key, value in numbers.items()}, step=record.index)
        done = f"{len(study.records)}/{self.config.outer.n_trials}"
        _LOG.info("trial %s (%s) %s%s", record.id, done, record.outcome(self.parts.rungs), _so_far(best))


def _so_far(best: OuterRecord | None) -> str:
    return "" if best is None else f"; best so far {best.id} with {best.value:.4f}"


def search_options(config: SearchRunConfig) -> list[str]:
    """The options of ``natsl search`` that make this config, as they are typed; all of the model, which has presets."""
    changes = changed_options(config, type(config)(), "")
    changes |= {f".model.{name}": value for name, value in to_plain(config.model).items()}
    return [option_line(name.removeprefix("."), value) for name, value in changes.items()]


def failure(error: Exception) -> str | None:
    """Why settings are of no use, if an error says that; null for one that has other causes.

    They diverge, nothing they lead to can be judged, or they do not fit into memory, which the next call tries again.
    """
    import torch

    from natsl.search.fault import describe
    from natsl.search.outer.study import OUT_OF_MEMORY
    from natsl.train import TrainingDivergedError

    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or on_cpu:
        return f"{OUT_OF_MEMORY} ({describe(error)})"
    if isinstance(error, TrainingDivergedError):
        return f"diverged ({describe(error)})"
    return describe(error) if isinstance(error, ArithmeticError) else None
