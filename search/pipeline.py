"""A whole search from a config: supernet, study, baselines, test scores, report, export. Resumes where it stopped."""

from __future__ import annotations

import contextlib
import gc
import logging
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from natsl.command import command, option_text, run_options
from natsl.data import TaskData
from natsl.device import probe_device, resolve_device
from natsl.errors import UserError
from natsl.files import read_json, to_plain, write_bytes, write_json, write_text
from natsl.heldout import keep_record
from natsl.model import RoutedLM
from natsl.progress import Progress
from natsl.resume import REPORT_OPTIONS, check_resume
from natsl.run import Run
from natsl.search.baseline import Named, baselines
from natsl.search.config import Launcher, SearchRunConfig
from natsl.search.controls.comparer import Comparer, ControlCounts, Rules
from natsl.search.controls.comparison import Comparison, chosen_points
from natsl.search.controls.static import most_evaluations
from natsl.search.families import Sweep, Swept, listed
from natsl.search.fault import reported_faults
from natsl.search.front import Front, Point
from natsl.search.journal import Journal
from natsl.search.judge import Judge, make_judge
from natsl.search.lengths import LengthRunner, Lengths
from natsl.search.pareto import Scale, Volume
from natsl.search.prepare import prepare, with_times
from natsl.search.question import Queue
from natsl.search.report.html import render
from natsl.search.report.png import front_png
from natsl.search.report.terminal import print_front, print_nothing_to_do
from natsl.search.samplers import Sampler
from natsl.search.score import Scorer, knee_choice, score, steps_to_score
from natsl.search.score_cache import ScoreCache
from natsl.search.source import made_from, obtain_supernet
from natsl.search.stopwatch import Stopwatch
from natsl.search.storage import reported_errors
from natsl.search.study import PolicyStudy, Problem, open_policy_study
from natsl.search.trial import Record
from natsl.search.view import SearchView
from natsl.search.worker.dispatch import Dispatcher, Pool
from natsl.search.worker.group import join
from natsl.search.worker.pool import Workers, job_devices, supernet_job, worker_devices
from natsl.search.worker.slurm import SlurmWorkers, make_executor
from natsl.search.worker.spare import Spares
from natsl.search.worker.table import TaskTable
from natsl.secrets import redact, redact_text
from natsl.signals import drains
from natsl.space.policy import Op, RoutingPolicy
from natsl.threads import threads_each
from natsl.tracking import Tracker, start_tracker

_LOG = logging.getLogger(__name__)

COMPARED, IN_HINDSIGHT = 6, 3  # points of a front that are compared with controls, and with those in hindsight


def run_search(config: SearchRunConfig, arguments: Sequence[str] = (), spares: Spares | None = None) -> Front | None:
    """Run or resume a search and return its front (None: everything was done before, or by another process).

    Where ``search.storage`` holds the study of a search that runs elsewhere, evaluate for that until it ends.

    ``arguments``: of the command line, for the report. ``spares``: processes that its workers begin with. Raises
    ``ValueError`` (``UserError``) for what the user has to fix, before anything is trained wherever it can be known.
    """
    device = resolve_device(config.device)
    config, problem, data, trained = prepare(config)
    if join(config, problem, data, device, spares):
        return None
    run = Run.open(config.name, config.root)
    with run.lock():
        outdated = bool(check_resume(run, config) & REPORT_OPTIONS)
        others = keep_record(run, data, config.root, trained, config.allow_other_data)
        watch = Stopwatch(run.hours, config.search.max_hours)
        finished = trials_reported(run) >= watch.wanted(config.search.n_trials) and not outdated
        if config.search.launcher is Launcher.slurm and not finished:
            make_executor(config.search.slurm, run.workers)  # what it needs is missed before anything is trained
        untrained = config.untrained_budgets()
        if untrained and not finished:
            _LOG.info("%s", untrained)
        problem = with_times(problem, config, run, device)
        tracker = Tracker() if finished else start_tracker(config.tracking, run, to_plain(config))
        view = SearchView(run.name, config.search.objectives)
        with tracker, watch if finished else watch.start(), contextlib.nullcontext() if finished else view:
            journal = Journal(run, tracker, config.search.objectives, view)
            search = _Search(
                config, run, data, problem, tracker, journal, watch, view, device, others, arguments, spares
            )
            return search.run(finished, outdated)


def trials_reported(run: Run) -> int:
    """How many trials the report of a run is about (−1: it has none). The report is the last file to be written."""
    if not run.report.exists() or not run.front_json.exists():
        return -1
    front = read_json(run.front_json)
    history = front.get("hypervolume_history") if isinstance(front, dict) else None
    if not isinstance(history, list):
        raise UserError(f"{run.front_json} is not a front written by natsl: move it away, and it is written again")
    return len(history)


def export_knee(run: Run, data: TaskData | None = None) -> Path | None:
    """The folder with the exported knee of a run's front, made unless it is there (None: the front has no knee).

    ``data``: as in ``export_point``. ``UserError`` if what is there is damaged or another model: it is left as it is.
    """
    from natsl.export import export_point
    from natsl.load import load_exported, read_point

    if read_json(run.front_json)["knee"] is None:
        return None
    point = read_point(run, "knee")
    folder = run.exports / str(point["id"])
    if not folder.exists():
        return export_point(run, "knee", data=data)
    _, policy = load_exported(folder)
    made_from = read_json(folder / "provenance.json")
    same = made_from.get("checkpoint", {}).get("sha256") == point["fingerprint"]["supernet"]
    if policy != RoutingPolicy.from_dict(point["policy"]) or not same or "calibration" in made_from:
        raise UserError(f"{folder} holds another model than the knee of this run: move it away")
    return folder


@dataclass(frozen=True)
class _Search:
    """The stages of one search, in order; each finds what an interrupted call has left."""

    config: SearchRunConfig
    folder: Run
    data: TaskData
    problem: Problem
    tracker: Tracker
    journal: Journal
    watch: Stopwatch
    view: SearchView
    device: torch.device
    others: tuple[str, ...]
    arguments: Sequence[str]
    spares: Spares | None

    def run(self, finished: bool, outdated: bool) -> Front | None:
        folder, settings = self.folder, self.config.search
        model: RoutedLM | None = obtain_supernet(self.config, folder, self.data, self.device, self.tracker)
        if finished or settings.launcher is not Launcher.inline:
            model = None  # workers have one of their own
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        sums = made_from(self.config, folder, self.data)
        with contextlib.closing(self._study(sums)) as study:
            if finished:
                print_nothing_to_do(folder, trials_reported(folder), self._ended(study))
                if self.config.export:
                    export_knee(folder)  # it is missing if the search was cut off after its report
                return None
            if outdated:
                folder.report.unlink(missing_ok=True)  # so that the next call does not take the search for finished
            folder.write_config(self.config)
            where = str(folder.study_db) if settings.storage is None else "search.storage"
            with reported_errors(where), reported_faults(), self._judge(study, sums, model) as judge:
                front = self._search(study, ScoreCache(folder.scores, sums).judge(judge))
        self._write(front)
        self.journal.front(front)
        exported = export_knee(folder, self.data) if self.config.export else None
        self.view.close()
        print_front(front, folder, f"{self._verb} {self._select}", exported)
        return front

    def _search(self, study: PolicyStudy, judge: Judge) -> Front:
        scorer = Scorer(judge, self.problem, self.config.search, self.config.seed, study.records)
        on_gpu = self._evaluation_device.type == "cuda"
        lengths = LengthRunner(judge, self.data, self.config.search, self.problem.costs, on_gpu)
        scale = self._trials(study, scorer, judge.queue)
        front = self._score(study, scorer, scale, judge.queue, lengths)
        return replace(front, lengths=self._at_lengths(front, lengths, scorer))

    @contextlib.contextmanager
    def _judge(self, study: PolicyStudy, sums: dict[str, Any], model: RoutedLM | None) -> Iterator[Judge]:
        """Who evaluates: the ``model`` in this process, or workers until the block ends."""
        settings = self.config.search
        if model is not None:
            yield make_judge(model.to(self.device), self.data, settings)
            return
        devices, on_slurm = worker_devices(settings, self.device), settings.launcher is Launcher.slurm
        in_job = len(job_devices(settings.slurm))
        threads = max(1, settings.slurm.cpus // in_job) if on_slurm else threads_each(len(devices))
        table = TaskTable(study.engine, study.id)
        text = self.data.corpus.fingerprint
        job = supernet_job(self.config, self.folder, study.id, study.threads(threads), sums["supernet"], text)

        def start(wanted: Callable[[str], bool]) -> Pool:
            if on_slurm:
                folder, jobs = self.folder.workers / "slurm", settings.workers or 1
                return SlurmWorkers(job, settings.slurm, jobs, folder, table, settings.trial_timeout, wanted)
            return Workers(job, devices, self.folder.workers, table, settings.trial_timeout, wanted, self.spares)

        if study.batch == 1 and len(devices) > 1 and study.remaining:
            _LOG.info("search.batch = 1: one trial is evaluated at a time, and %d workers share the rest", len(devices))
        beat = study.beat if settings.storage is not None else lambda: None
        seconds, on_look = settings.lease_seconds, self.view.show_workers
        with (
            contextlib.closing(Dispatcher(table, start, seconds, beat, on_look)) as dispatcher,
            drains(lambda: _LOG.info("what is being evaluated is finished first; Ctrl-C again stops at once")),
        ):
            yield dispatcher.judge()

    def _study(self, sums: dict[str, Any]) -> PolicyStudy:
        path, name = self.folder.study_db, self.folder.name
        settings, workers = self.config.search, len(worker_devices(self.config.search, self.device))
        return open_policy_study(path, name, settings, self.problem, self.config.seed, sums, workers)

    def _trials(self, study: PolicyStudy, scorer: Scorer, queue: Queue) -> Scale:
        # Whatever the trials find, these will be asked for.
        scorer.expect_sweeps(listed(self._sweep(())), study.first, later=True)
        scorer.expect_test([item.policy for item in self._fixed()], later=True)
        first = study.first[: self.config.search.n_trials]
        if len(study.records) < len(first) and not self.watch.up:
            with Progress("anchors", len(first)) as progress:
                scorer.prepare(first, progress.update, trials=True)
        try:
            scale = scorer.scale()
        except FloatingPointError as error:
            raise UserError(f"all-softmax or all-delta cannot be judged ({error}): the supernet is of no use") from None
        volume = Volume(scale)
        for record in study.records:
            volume.add(record.result)
        self.journal.resume(study.records, volume.now)
        if study.cut_off:
            _LOG.info("%d trials were cut off before; they are made again", study.cut_off)
        if study.foreign:
            numbers = ", ".join(map(str, study.foreign[:5])) + (", ..." if len(study.foreign) > 5 else "")
            _LOG.info("trials of the study that natsl did not make are skipped: %s", numbers)
        with Progress("search", self.config.search.n_trials, len(study.records)) as progress:

            def on_record(record: Record) -> None:
                volume.add(record.result)
                self.journal.trial(record, volume.now)
                failed = sum(item.reason is not None for item in study.records)
                text = f"hypervolume {volume.now:.4f}" + (f", {failed} failed" if failed else "")
                progress.update(len(study.records), text)

            study.stops = lambda: self.watch.up
            inline = self.config.search.launcher is Launcher.inline  # else workers see to their devices
            study.run(scorer.on_share, on_record, lambda: probe_device(self.device) if inline else None, queue)
        ended = self._ended(study)
        self.watch.stop(-1 if ended is None else sum(not record.transient for record in study.records))
        if ended is not None:
            _LOG.info("%s: the front is scored", ended)
        return scale

    def _ended(self, study: PolicyStudy) -> str | None:
        """A line for a search whose time was up before its trials were made."""
        return self.watch.ended(len(study.records), self.config.search.n_trials) if study.remaining else None

    def _fixed(self) -> list[Named]:
        """The baselines that every search with such a model has."""
        settings = self.config.search
        return baselines(self.problem.kinds, self.problem.chunk_size, settings.uniform_budgets, settings.space)

    def _score(self, study: PolicyStudy, scorer: Scorer, scale: Scale, queue: Queue, lengths: LengthRunner) -> Front:
        """Front, baselines and controls on the test split, and what else the report tells."""
        settings, chosen = self.config.search, study.front()
        fixed = self._fixed()
        known = {item.policy.digest() for item in fixed}
        heads = sum(shape.heads for shape in self.problem.costs.shapes if shape.kind is Op.routed)
        with Progress("heads", most_evaluations(heads)) as progress:
            static = scorer.static_heads(lambda name: progress.update(progress.done + 1, name))
        fixed += [item for item in static if item.policy.digest() not in known]
        swept = self._families(scorer, static, study.first)
        comparer = self._comparer(scorer.counts, [item.policy for item in static], queue)
        compared: list[tuple[Point, bool]] = []

        def on_points(points: Sequence[Point], knee: int | None) -> None:
            compared.extend(self._compared(points, knee))
            comparer.expect({point.policy: hindsight for point, hindsight in compared})
            lengths.expect([*(point.policy for point, _ in compared), *self._ends().values()])

        with Progress("test", steps_to_score(chosen, fixed, swept)) as progress:
            points, others, families = score(
                scorer, chosen, fixed, swept, lambda name: progress.update(progress.done + 1, name), on_points
            )
        knee = scale.knee([point.search_values for point in points])
        comparisons = self._compare(comparer, compared)
        volume = Volume(scale)
        # A trial that has to be tried again is not made: without it the history is shorter, and the run not finished.
        history = tuple(volume.add(record.result) for record in study.records if not record.transient)
        failed = [record for record in study.records if record.reason is not None]
        counts = {"trials": len(study.records), "trials failed": len(failed)}
        counts["judged on a part"] = sum(not record.complete for record in study.records)
        problems = [f"{len(failed)} trials failed, the last one: {failed[-1].reason}"] if failed else []
        again = len(study.records) - len(history)
        if again:
            problems.append(f"{again} of them by a fault of the machine: the same command tries them again")
        lines = [self._ended(study), self.config.untrained_budgets(), scorer.no_use_of_softmax()]
        problems += [line for line in lines if line]
        if not settings.synchronous:
            problems.append("search.synchronous = false: which policies were tried depends on how fast workers were")
        problems += [f"part of the trials and scores is of other text: {other}" for other in self.others]
        return Front(
            run=self.folder.name,
            objectives=scorer.names,
            points=points,
            baselines=others,
            knee=None if knee is None else points[knee].id,
            hypervolume=volume.now,
            history=history,
            fingerprint=dict(study.fingerprint),
            facts={
                "counts": {name: count for name, count in counts.items() if count},
                "problems": problems + scorer.problems + comparer.problems,
                "evaluations": {**scorer.evaluations(study.records), "controls": comparer.passes},
                "select": self._select,
                "commands": self._commands(),
                "setting": self._setting(study.sampler),
            },
            comparisons=comparisons,
            families=families,
            hypervolume_test=scale.hypervolume([point.values for point in points]),
            knee_choice=None if knee is None else knee_choice(points, knee, scale),
        )

    def _sweep(self, static: Sequence[Named]) -> Sweep:
        problem, settings = self.problem, self.config.search
        budgets = tuple(settings.uniform_budgets)
        return Sweep(problem.kinds, problem.chunk_size, problem.heads, settings.space, budgets, tuple(static))

    def _families(self, scorer: Scorer, static: Sequence[Named], first: Sequence[RoutingPolicy]) -> list[Swept]:
        """The families of baselines on the search split."""
        families = listed(self._sweep(static))
        with Progress("families", sum(len(members) for _, members in families)) as progress:

            def on_step(name: str) -> None:
                progress.update(progress.done + 1, name)

            scorer.expect_sweeps(listed(self._sweep(())), first)
            return [scorer.sweep(family, members, on_step) for family, members in families]

    def _comparer(self, counts: ControlCounts, static: Sequence[RoutingPolicy], queue: Queue) -> Comparer:
        kinds, chunk = self.problem.kinds, self.problem.chunk_size
        family = [RoutingPolicy.all_delta(kinds, chunk), *static, RoutingPolicy.all_softmax(kinds, chunk)]
        rules = Rules(self.config.seed, self.config.search.random_draws, self.config.supernet.route_noise)
        return Comparer(counts, self.problem.costs.shapes, family, rules, queue)

    @staticmethod
    def _compared(points: Sequence[Point], knee: int | None) -> list[tuple[Point, bool]]:
        """What is compared with controls, and whether with those in hindsight: the knee, the ends that route, others.

        Those with hindsight come first: they take longest.
        """
        routing = [float(any(layer.op is Op.routed for layer in point.policy.layers)) for point in points]
        costs = [routed * point.measured["kept_fraction"] for routed, point in zip(routing, points, strict=True)]
        chosen = chosen_points(costs, knee, COMPARED, IN_HINDSIGHT)
        return [(points[place], chosen[place]) for place in sorted(chosen, key=lambda place: not chosen[place])]

    def _compare(self, comparer: Comparer, compared: Sequence[tuple[Point, bool]]) -> tuple[Comparison, ...]:
        """Points of the front beside their controls, in the order of the front."""
        found: list[tuple[float, Comparison]] = []
        with Progress("controls", comparer.planned(hindsight for _, hindsight in compared)) as progress:
            for point, hindsight in compared:
                item = comparer.compare(
                    point.id, point.policy, hindsight, lambda name: progress.update(comparer.passes, name)
                )
                if item is not None:
                    self.journal.comparison(item, len(found))
                    found.append((point.measured["kept_fraction"], item))
            progress.total = progress.done  # some tasks know fewer controls
        return tuple(item for _, item in sorted(found, key=lambda pair: (pair[0], pair[1].of)))

    def _ends(self) -> dict[str, RoutingPolicy]:
        kinds, chunk = self.problem.kinds, self.problem.chunk_size
        ends = (RoutingPolicy.all_softmax(kinds, chunk), RoutingPolicy.all_delta(kinds, chunk))
        return dict(zip(("all-softmax", "all-delta"), ends, strict=True))

    def _at_lengths(self, front: Front, runner: LengthRunner, scorer: Scorer) -> Lengths:
        """The points that were compared with controls and the two ends, measured at other lengths."""
        policies = {item.of: front.point(item.of).policy for item in front.comparisons} | self._ends()
        with Progress("lengths", len(policies) * len(runner.lengths)) as progress:
            return runner.measure(policies, scorer.on_test, lambda name: progress.update(progress.done + 1, name))

    def _setting(self, sampler: Sampler) -> dict[str, Any]:
        data, settings, table = self.config.data, self.config.search, self.problem.costs.latency
        made = {} if table is None else table.made_from
        timed = {"times of": f"{made['device']}, batch size {made['batch_size']}"} if made else {}
        return {
            "seed": self.config.seed,
            "sampler": sampler.value,
            "text": self.data.corpus.description,
            "sequences per task": f"{data.search_sequences} to search, {data.test_sequences} to test",
            "draws of random routing": settings.random_draws,
            "tokens per sequence": data.seq_len,
            "device": str(self._evaluation_device),
            "torch": torch.__version__,
            **timed,
        }

    @property
    def _evaluation_device(self) -> torch.device:
        slurm = self.config.search.slurm if self.config.search.launcher is Launcher.slurm else None
        return self.device if slurm is None else torch.device("cuda" if slurm.gpus else "cpu")

    def _commands(self) -> list[str]:
        options = run_options(self.folder.name, self.config.root)
        again, note = command("search", {"name": self.folder.name, "root": options["root"]}), []
        if self.arguments:
            shown = [redact_text(argument) for argument in self.arguments]
            again = shlex.join(["natsl", "search", *shown])
            note = [] if shown == list(self.arguments) else ["# secrets were removed from this command:"]
        return [*note, again, *(command(verb, {**options, "pick": "knee"}) for verb in ("export", self._verb))]

    @property
    def _verb(self) -> str:
        """The command that shows what the knee can do: ``generate`` has no tokenizer."""
        return "evaluate" if self.data.corpus.tokens else "generate"

    @property
    def _select(self) -> str:
        """How other commands name this run, for a shell."""
        return option_text(run_options(self.folder.name, self.config.root))

    def _write(self, front: Front) -> None:
        run = self.folder
        run.report.unlink(missing_ok=True)  # its presence says that all files belong together
        plain = front.to_dict()
        write_json(run.front_json, plain | {"facts": redact(plain["facts"])})  # the rest is read back
        write_text(run.front_csv, redact_text(front.to_csv()))
        write_bytes(run.front_png, front_png(front))
        write_text(run.report, redact_text(render(front)))
