"""A whole search from a config: supernet, study, baselines, test scores, report, export. Resumes where it stopped."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from natsl import __version__, checkpoint
from natsl.cli import resolve_device
from natsl.config import check_batch, to_plain
from natsl.data import Split, load_text
from natsl.evaluate import Evaluation, RandomRouting, evaluate
from natsl.model import RoutedLM
from natsl.progress import Progress
from natsl.run import Run, UserError, read_json, redact_text, write_bytes, write_text
from natsl.search.baseline import baselines
from natsl.search.config import SearchRunConfig
from natsl.search.front import Front, Point
from natsl.search.objective import OBJECTIVES, CostContext, find_objectives
from natsl.search.pareto import Scale, Volume
from natsl.search.report.html import headline, render, show
from natsl.search.report.png import front_png
from natsl.search.score import Judge, Scorer, score, steps_to_score
from natsl.search.study import PolicyStudy, Problem, Record, first_policies, open_policy_study
from natsl.space.policy import Op, RoutingPolicy
from natsl.tasks import TaskData
from natsl.tracking import Tracker, start_tracker
from natsl.train import TrainRecipe, fit

_TABLE_ROWS = 14  # of the table at the end


def run_search(config: SearchRunConfig, command: str = "") -> Front | None:
    """Run or resume a search and return its front (None: everything was done before).

    ``command``: how it was called, told in the report. Raises ``ValueError`` (``UserError``) for what the user has to
    mend, before anything is trained wherever it can be known.
    """
    device = resolve_device(config.device)
    source = None
    if config.supernet_from is None:
        check_batch(config.model.layers, config.train, config.supernet)
    else:
        source = Run.open(config.supernet_from, config.root, create=False)
        config.model = checkpoint.load_model(source.supernet)[0].config
    problem = make_problem(config)
    run = Run.open(config.name, config.root)
    with run.lock():
        if not run.config.exists():
            run.write_config(config)
        text = load_text(config.data.path)
        data = TaskData(config.data, text, config.model.vocab_size)
        finished = trials_reported(run) >= config.search.n_trials
        with Tracker() if finished else start_tracker(config.tracking, run, to_plain(config)) as tracker:
            search = _Search(config, run, data, problem, tracker, device, text.description, command)
            return search.run(source, finished)


def make_problem(config: SearchRunConfig) -> Problem:
    """What the search asks; ``ValueError`` if the space, the objectives or the first policies do not fit the model."""
    model = config.model
    kinds = tuple(model.layers)
    if Op.routed not in kinds:
        names = ", ".join(kind.value for kind in kinds)
        raise UserError(f"model.layers = [{names}] is not allowed: a search needs at least one routed layer")
    tasks = {name for name, weight in config.data.tasks.items() if weight > 0}
    objectives = find_objectives(config.search.objectives, tasks, config.search.constraints)
    given = [read_policy(Path(path)) for path in config.search.policies]
    first = first_policies(config.search, kinds, model.chunk_size, given)
    costs = CostContext(model.layer_shapes(), config.search.context)
    return Problem(kinds, model.chunk_size, costs, objectives, first)


def trials_reported(run: Run) -> int:
    """How many trials the report of a run is about (0: it has none). The report is the last file to be written."""
    reported = run.report.exists() and run.front_json.exists()
    return len(read_json(run.front_json)["hypervolume_history"]) if reported else 0


def export_knee(run: Run) -> Path | None:
    """The folder with the exported knee of a run's front, made unless it is there (None: the front has no knee).

    ``UserError`` if what is there is damaged or another model: it is left as it is.
    """
    from natsl.export import export_point, load_exported, read_point

    if read_json(run.front_json)["knee"] is None:
        return None
    point = read_point(run, "knee")
    folder = run.exports / str(point["id"])
    if not folder.exists():
        return export_point(run, "knee")
    _, policy = load_exported(folder)
    made_from = read_json(folder / "provenance.json").get("checkpoint", {}).get("sha256")
    if policy != RoutingPolicy.from_dict(point["policy"]) or made_from != point["fingerprint"]["supernet"]:
        raise UserError(f"{folder} holds another model than the knee of this run: move it away")
    return folder


def read_policy(path: Path) -> RoutingPolicy:
    """A policy from a JSON file; ``UserError`` naming the file if it cannot be read."""
    try:
        return RoutingPolicy.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"search.policies: {path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"search.policies: {path}: {error}") from None


@dataclass
class _Search:
    config: SearchRunConfig
    run_folder: Run
    data: TaskData
    problem: Problem
    tracker: Tracker
    device: torch.device
    text: str
    command: str

    def run(self, source: Run | None, finished: bool) -> Front | None:
        run, settings = self.run_folder, self.config.search
        model = self._supernet(source).to(self.device)
        record = checkpoint.read_newest(run.supernet)
        assert record is not None, "the supernet was stored or copied above"
        made_from = {
            "natsl": __version__,
            "model": to_plain(self.config.model),
            "data": self.data.fingerprint,
            "supernet": record[1]["sha256"],
        }
        study = open_policy_study(run.study_db, run.name, settings, self.problem, self.config.seed, made_from)
        if finished:
            print(f"nothing to do: all {trials_reported(run)} trials of {run.name!r} are made; see {run.report}")
            if self.config.export:
                export_knee(run)  # it is missing if the search was cut off after its report
            return None
        run.write_config(self.config)
        scorer = Scorer(
            make_judge(model, self.data, settings.batch_size), self.problem, settings, self.config.seed, study.records
        )
        scale = self._trials(study, scorer)
        front = self._score(study, scorer, scale)
        self._write(front)
        self._finish(front)
        return front

    def _supernet(self, source: Run | None) -> RoutedLM:
        """The supernet of this run: trained, resumed, or copied from another run."""
        config, run = self.config, self.run_folder
        if source is None:
            recipe = TrainRecipe(config.train, config.supernet, config.seed)
            return fit(run, config.model, self.data, recipe, self.device, self.tracker)
        copied = bool(checkpoint.steps(run.supernet))
        model, record = checkpoint.load_model((run if copied else source).supernet)
        if not record.get("finished"):
            raise UserError(f"the supernet of run {source.name!r} is not trained to its end: resume that run first")
        if record.get("data") != self.data.fingerprint:
            print(f"note: the supernet of {source.name!r} was trained on other data")
        if source.calibration.exists():
            write_bytes(run.calibration, source.calibration.read_bytes())
        if not copied:
            copy_checkpoint(source.supernet, run.supernet, record["step"])
        return model

    def _trials(self, study: PolicyStudy, scorer: Scorer) -> Scale:
        try:
            scale = scorer.scale()
        except FloatingPointError as error:
            raise UserError(f"all-softmax or all-delta cannot be judged ({error}): the supernet is of no use") from None
        volume = Volume(scale)
        for record in study.records:
            volume.add(record.result)
        if study.cut_off:
            print(f"note: {study.cut_off} trials were cut off before; they are made again")
        with Progress("search", self.config.search.n_trials, len(study.records)) as progress:

            def on_record(record: Record) -> None:
                volume.add(record.result)
                self._log_trial(record, volume.now)
                failed = sum(item.reason is not None for item in study.records)
                text = f"hypervolume {volume.now:.4f}" + (f", {failed} failed" if failed else "")
                progress.update(len(study.records), text)

            study.run(scorer.on_search, on_record)
        return scale

    def _log_trial(self, record: Record, hypervolume: float) -> None:
        numbers: dict[str, Any] = {"hypervolume": hypervolume, **(record.values or {})}
        if record.evaluation is not None:
            numbers |= {f"kept_layer_{i}": kept for i, kept in enumerate(record.evaluation.kept_by_layer)}
        self.tracker.log({f"search/{key}": value for key, value in numbers.items()}, step=record.index)
        row = {"event": "trial", "trial": record.id, "policy": record.policy.describe(), **numbers}
        reason = {} if record.reason is None else {"failed": record.reason}
        self.run_folder.log(row | reason | ({} if record.same_as is None else {"same_as": record.same_as}))

    def _score(self, study: PolicyStudy, scorer: Scorer, scale: Scale) -> Front:
        """Front and baselines on the test split, and what else the report tells."""
        settings, chosen = self.config.search, study.front()
        fixed = baselines(self.problem.kinds, self.problem.chunk_size, settings.uniform_budgets, settings.space)
        with Progress("test", steps_to_score(chosen, fixed)) as progress:
            points, others = score(scorer, chosen, fixed, lambda name: progress.update(progress.done + 1, name))
        knee = scale.knee([point.search_values for point in points])
        volume = Volume(scale)
        history = tuple(volume.add(record.result) for record in study.records)
        failed = [record for record in study.records if record.reason is not None]
        problems = [f"{len(failed)} trials failed, the last one: {failed[-1].reason}"] if failed else []
        return Front(
            run=self.run_folder.name,
            objectives=scorer.names,
            points=points,
            baselines=others,
            knee=None if knee is None else points[knee].id,
            hypervolume=volume.now,
            history=history,
            fingerprint=dict(study.fingerprint),
            facts={
                "counts": {"trials": len(study.records)} | ({"trials failed": len(failed)} if failed else {}),
                "problems": problems + scorer.problems,
                "select": self.select,
                "commands": self._commands(),
                "setting": self._setting(),
            },
        )

    def _setting(self) -> dict[str, Any]:
        data, settings = self.config.data, self.config.search
        return {
            "seed": self.config.seed,
            "sampler": settings.sampler.value,
            "text": self.text,
            "sequences per task": f"{data.search_sequences} to search, {data.test_sequences} to test",
            "draws of random routing": settings.random_draws,
            "tokens per sequence": data.seq_len,
            "device": str(self.device),
            "torch": torch.__version__,
        }

    def _commands(self) -> list[str]:
        again = redact_text(self.command) or f"natsl-search {self.select.replace('run=', 'name=', 1)}"
        return [again, *(f"python -m natsl.{verb} {self.select} pick=knee" for verb in ("export", "generate"))]

    @property
    def select(self) -> str:
        """How other commands name this run."""
        root = "" if self.config.root == "runs" else f" root={shlex.quote(self.config.root)}"
        return f"run={self.run_folder.name}{root}"

    def _write(self, front: Front) -> None:
        run, tracker = self.run_folder, self.tracker
        run.report.unlink(missing_ok=True)  # its presence says that all files belong together
        run.write_json(run.front_json, front.to_dict())
        write_text(run.front_csv, redact_text(front.to_csv()))
        write_bytes(run.front_png, front_png(front))
        write_text(run.report, redact_text(render(front)))
        tracker.summary({"hypervolume": front.hypervolume, "points": len(front.points), "knee": front.knee})
        measures = list(dict.fromkeys([*front.objectives, "kept_fraction", front.quality]))
        rows = [
            [
                item.id if isinstance(item, Point) else item.name,
                "front" if isinstance(item, Point) else item.kind.value,
                item.policy.describe(),
                *(item.values.get(name, item.measured.get(name)) for name in measures),
            ]
            for item in front.rows
        ]
        tracker.table("front", ["name", "kind", "policy", *measures], rows)
        tracker.image("front_plot", run.front_png)
        tracker.html("report", run.report)
        tracker.file(f"{run.name}-front", run.front_json)

    def _finish(self, front: Front) -> None:
        """Export the knee and say what was found and what can be done next."""
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        run, console = self.run_folder, Console()
        exported = export_knee(run) if self.config.export else None
        names = list(dict.fromkeys([*front.objectives, "kept_fraction", front.quality]))
        table = Table(title=f"front of {escape(run.name)}, test split", title_justify="left")
        labels = [OBJECTIVES[name].label for name in names]
        for title in ("point", "policy", *labels, "random routing", "dominated by"):
            table.add_column(title)
        shown = front.points
        if len(shown) > _TABLE_ROWS:
            places = {i * (len(shown) - 1) // (_TABLE_ROWS - 2) for i in range(_TABLE_ROWS - 1)}
            shown = tuple(point for i, point in enumerate(shown) if i in places or point.id == front.knee)
        for point in shown:
            control = front.random_of(point.id)
            random = None if control is None else control.measured.get(front.quality)
            values = [show(name, point.values.get(name, point.measured.get(name))) for name in names]
            mark = " knee" if point.id == front.knee else ""
            cells = [point.id + mark, point.policy.describe(), *values, show(front.quality, random)]
            table.add_row(*map(escape, cells), escape(", ".join(point.dominated_by) or "–"))
        if shown:
            console.print(table)
        if len(shown) < len(front.points):
            console.print(
                f"{len(shown)} of {len(front.points)} points; all of them are in {run.front_csv}", markup=False
            )
        lines = [text for text, _ in headline(front)]
        lines += [f"report  {run.report}", f"picture {run.front_png}"]
        lines += [f"export  {exported}"] if exported is not None else []
        if front.points:
            lines.append(f"next    python -m natsl.generate {self.select} pick=knee")
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def copy_checkpoint(source: Path, target: Path, step: int) -> None:
    """Copy one checkpoint; the folder ``target``, which holds no checkpoint yet, appears whole or not at all."""
    temporary = target.with_name(f".{target.name}.new")
    for folder in (temporary, target):
        if folder.exists():  # what an interrupted copy or training has left
            shutil.rmtree(folder)
    temporary.mkdir()
    for ending in ("safetensors", "json"):
        name = f"step-{step:06d}.{ending}"
        shutil.copyfile(source / name, temporary / name)
    temporary.rename(target)


def make_judge(model: RoutedLM, data: TaskData, batch_size: int) -> Judge:
    """A judge of a supernet's policies. Random routing sees the same test sequences in every draw."""
    search, test = data.eval_sets(Split.search), data.eval_sets(Split.test)

    def random(policy: RoutingPolicy, fractions: tuple[float, ...], seed: int) -> Evaluation:
        return evaluate(model, policy, test, random_routing=RandomRouting(seed, fractions), batch_size=batch_size)

    return Judge(
        lambda policy: evaluate(model, policy, search, batch_size=batch_size),
        lambda policy: evaluate(model, policy, test, batch_size=batch_size),
        random,
    )
