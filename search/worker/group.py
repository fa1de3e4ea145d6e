"""Workers that join a search of another machine: the same command, while that one owns the study."""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import optuna
import torch
from optuna.storages import RDBStorage

from natsl import checkpoint
from natsl.data import TaskData
from natsl.errors import UserError
from natsl.files import child_folder, user_path
from natsl.progress import Progress
from natsl.run import Run
from natsl.search.config import Launcher, SearchConfig, SearchRunConfig
from natsl.search.owner import OWNER, Owner
from natsl.search.source import made_from
from natsl.search.storage import BEAT, FINGERPRINT, SHARED, THREADS, connect, difference, reported_errors
from natsl.search.study import Problem, fingerprint_of
from natsl.search.worker.pool import Clock, Workers, supernet_job, worker_devices
from natsl.search.worker.spare import Spares
from natsl.search.worker.table import METADATA, TaskTable
from natsl.threads import threads_each

_LOG = logging.getLogger(__name__)
_LOOK_SECONDS = 0.5
_FIRST_BEAT = 15.0  # seconds in which a controller that lives is seen to
SILENCE = 5  # so many search.lease_seconds without a beat, and the controller is gone


def join(
    config: SearchRunConfig, problem: Problem, data: TaskData, device: torch.device, spares: Spares | None = None
) -> bool:
    """Evaluate for the search that owns the study, until it ends; False: nobody owns it, or none that lives.

    ``UserError`` if this process has not what is searched (its supernet, its text, its settings, its version of natsl),
    if the search lets nobody join, or if it has not come to its trials.
    """
    settings = config.search
    if settings.storage is None:
        return False
    storage = connect(settings.storage)
    with reported_errors("search.storage"), _closing(storage):
        run = Run(child_folder(user_path(config.root, "root"), config.name, "name"))
        known = config.name in optuna.get_all_study_names(storage)
        controller = Controller(storage, storage.get_study_id_from_name(config.name)) if known else None
        if controller is None or not controller.lives():
            _begin(config, run, known)
            return False
        study = controller.study
        attributes = storage.get_study_user_attrs(study)
        shared = attributes.get(SHARED, {})
        inline = shared.get("launcher") == Launcher.inline.value
        if inline or settings.launcher is not Launcher.local:
            how = ", which evaluates by itself (search.launcher = inline)" if inline else ""
            advice = "" if inline else ", or join it with search.launcher = local"
            raise UserError(
                f"the study {config.name!r} is in use by {controller.describe()}{how}: wait until it has ended, or "
                f"choose another name{advice}"
            )
        sums = _check_inputs(attributes.get(FINGERPRINT, {}), config, problem, data, run)
        settings = _with_lease(shared, settings, config.name)
        devices = worker_devices(settings, device)
        threads = storage.get_study_user_attrs(study).get(THREADS, threads_each(len(devices)))
        same, text = replace(config, search=settings), data.corpus.fingerprint
        job = supernet_job(same, run, study, threads, sums["supernet"], text)
        _LOG.info(
            "the study %r is another process's (%s): this one evaluates for it", config.name, controller.describe()
        )
        folder = run.workers / f"{platform.node()}-{time.time_ns():x}"
        table = TaskTable(storage.engine, study)
        METADATA.create_all(storage.engine)  # the controller may not have come to it
        with Progress("tasks done", None) as progress:
            serve(
                lambda: Workers(job, devices, folder, table, settings.trial_timeout, spares=spares),
                lambda: controller.beats(SILENCE * settings.lease_seconds),
                progress.update,
            )
        _LOG.info("%s", controller.end())
        return True


def _begin(config: SearchRunConfig, run: Run, known: bool) -> None:
    """Say what it means that this process makes the search, whose study is ``known`` or not, and not another one.

    A process that still trains has no study. In a root that both see, the lock of its run tells; elsewhere nothing.
    """
    if config.search.launcher is Launcher.local and run.is_held():
        raise UserError(
            f"the run {config.name!r} is in use by another process, which makes no trials at the moment (it trains, or "
            "reports): run this command again once it does, to evaluate for it"
        )
    trains = config.supernet_from is None and not checkpoint.steps(run.supernet)
    if known and trains:
        _LOG.info(
            "the supernet of the study %r is not in %s: one is trained there, and unless it is the same, the study is "
            "refused; use the root in which it was made, or copy that run folder",
            config.name,
            run.supernet,
        )
    elif not known:
        _LOG.info(
            "search.storage has no study %r yet, so this process makes the search%s: start other machines' commands "
            "once its trials run",
            config.name,
            " and trains its supernet" if trains else "",
        )


@contextlib.contextmanager
def _closing(storage: RDBStorage) -> Iterator[None]:
    try:
        yield
    finally:
        storage.remove_session()
        storage.engine.dispose()


def serve(
    start: Callable[[], Workers], wanted: Callable[[], bool], show: Callable[[int], None] = lambda done: None
) -> None:
    """Have workers make tasks as long as they are ``wanted``, which is asked every now and then.

    ``show`` gets the number of tasks that they have finished whenever it has changed.
    """
    clock, shown = Clock(2 * _LOOK_SECONDS), 0
    with contextlib.closing(start()) as workers:
        while wanted():
            until = time.monotonic() + _LOOK_SECONDS
            while (left := until - time.monotonic()) > 0:
                workers.watch(left)
            workers.look(clock.lap())
            if workers.done != shown:
                shown = workers.done
                show(shown)


def _check_inputs(
    stored: dict[str, Any], config: SearchRunConfig, problem: Problem, data: TaskData, run: Run
) -> dict[str, Any]:
    """What results depend on here, which must be what they depend on in the study with the fingerprint ``stored``."""
    sums = made_from(config, run, data) if checkpoint.steps(run.supernet) else None
    if sums is None or sums["supernet"] != stored.get("supernet"):
        state = "is missing" if sums is None else "is another one"
        raise UserError(
            f"the supernet of the search {config.name!r}, which another process makes, {state} in {run.supernet}: to "
            "join it, use a root that both machines see, or copy its run folder here"
        )
    own = fingerprint_of(config.search, problem, config.seed, sums, 1)(stored)
    changes = difference({**stored, "latency": None}, {**json.loads(json.dumps(own)), "latency": None})
    if changes:
        raise UserError(
            f"the search {config.name!r}, which another process makes, has other settings ({'; '.join(changes)}): "
            "join it with the same command, or choose another name"
        )
    return sums


def _with_lease(owner: dict[str, Any], settings: SearchConfig, name: str) -> SearchConfig:
    """``settings`` with the lease of the study's owner; ``UserError`` where evaluations would be in other batches."""
    size = owner.get("batch_size", settings.batch_size)
    if size != settings.batch_size:
        raise UserError(
            f"the search {name!r}, which another process makes, has search.batch_size = {size}, not "
            f"{settings.batch_size}: join it with the same command, or choose another name"
        )
    return replace(settings, lease_seconds=owner.get("lease_seconds", settings.lease_seconds))


class Controller:
    """The process that owns a study, as far as its attributes tell."""

    def __init__(self, storage: RDBStorage, study: int) -> None:
        self._storage, self.study = storage, study
        self._beat: Any = None
        self._seen = time.monotonic()

    def _read(self) -> tuple[Owner | None, Any]:
        try:
            attributes = self._storage.get_study_user_attrs(self.study)
        except KeyError:  # the study was deleted
            return None, None
        owner = attributes.get(OWNER)
        with contextlib.suppress(TypeError):
            return None if owner is None else Owner(**owner), attributes.get(BEAT)
        return None, None

    def describe(self) -> str:
        """Which process it is."""
        owner, _ = self._read()
        return "it has ended" if owner is None else f"process {owner.pid} on {owner.host}"

    def end(self) -> str:
        """What has become of it, once it has ``beats`` no more."""
        owner, _ = self._read()
        if owner is None:
            return "the search has ended, or was stopped"
        return f"process {owner.pid} on {owner.host} is gone without an end of the search: its command goes on there"

    def lives(self) -> bool:
        """Whether it is another process than this one, and runs; waits for a beat where nothing else tells."""
        owner, first = self._read()
        here = Owner.named("")
        if owner is None or owner.is_gone(here) or (owner.pid, owner.started) == (here.pid, here.started):
            return False
        if owner.is_visible(here):
            return True
        end = time.monotonic() + _FIRST_BEAT
        while time.monotonic() < end:
            if self._read()[1] != first:
                return True
            time.sleep(_LOOK_SECONDS)
        return False

    def beats(self, seconds: float) -> bool:
        """Whether the study has an owner that was seen to work in so many seconds."""
        owner, beat = self._read()
        if beat != self._beat:
            self._beat, self._seen = beat, time.monotonic()
        gone = owner is None or owner.is_gone(Owner.named(""))
        return not gone and time.monotonic() - self._seen <= seconds
