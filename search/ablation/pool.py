"""The jobs of an ablation in processes of their own, each on a device that is free. No torch at import."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from natsl.config import TRAINING_VERSION
from natsl.errors import UserError
from natsl.files import read_json
from natsl.search.ablation.job import Job, run_job
from natsl.search.ablation.record import FORMAT

_LONGEST = 20_000  # characters of a message, which a pipe holds without a reader


def stored_results(jobs: Sequence[Job]) -> tuple[list[dict[str, Any]], list[Job]]:
    """Results that are there already, and the jobs that have none.

    ``UserError`` if a result is of other text, of other settings and without its supernet, or, where jobs are left, of
    another way of training.
    """
    results, waiting = [], []
    for job in jobs:
        if not job.result.exists():
            waiting.append(job)
            continue
        stored = read_json(job.result)
        if stored.get("format") != FORMAT:
            raise UserError(f"{job.result} has another format than this natsl writes: choose another name")
        if stored["fingerprint"] != job.fingerprint():
            if job.has_supernet():  # it is judged again
                waiting.append(job)
                continue
            raise UserError(
                f"{job.result} was made under other settings: choose another name, or restore them (a result is "
                "found by the place of its variant: new ones go to the end)"
            )
        if stored["text"] != job.text:
            raise UserError(f"{job.result} is of other text than data.path holds now: choose another name")
        results.append({**stored, "variant": job.variant})  # which may have been renamed
    other = next((result for result in results if result["version"] != TRAINING_VERSION), None)
    if waiting and other is not None:
        raise UserError(
            f"the result of variant {other['variant']!r}, seed {other['seed']}, is of a natsl that trains in another "
            f"way (training version {other['version']}, now {TRAINING_VERSION}): finish the ablation with it or choose "
            "another name"
        )
    return results, waiting


def run_jobs(jobs: Sequence[Job], workers: int, devices: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Results of jobs as they finish, ``workers`` at a time; each device in turn takes one of them.

    A job gets the device of the one that has finished before it. One that fails ends the others, which leave their
    checkpoints: ``UserError`` names its variant and seed.
    """
    waiting = deque(jobs)
    free = deque(devices[slot % len(devices)] for slot in range(min(workers, len(waiting))))
    running: dict[int, _Worker] = {}
    try:
        while waiting or running:
            while waiting and free:
                worker = _start(waiting.popleft(), free.popleft())
                running[worker.process.sentinel] = worker
            for sentinel in wait(list(running)):
                assert isinstance(sentinel, int)
                worker = running.pop(sentinel)
                free.append(worker.device)
                yield worker.result()
    finally:
        for worker in running.values():
            worker.process.terminate()
        for worker in running.values():
            worker.process.join()


@dataclass(frozen=True)
class _Worker:
    """The process of a job and the end of a pipe that says why it failed."""

    process: SpawnProcess
    job: Job
    device: str
    messages: Connection

    def result(self) -> dict[str, Any]:
        """The result of a job whose process has ended."""
        self.process.join()
        name = f"variant {self.job.variant!r}, seed {self.job.seed}"
        try:
            is_mistake, message = self.messages.recv()
        except EOFError:  # it did not fail by itself
            is_mistake, message = True, None
        if message is not None:
            raise UserError(f"{name}: {message}") if is_mistake else RuntimeError(f"{name}:\n{message}")
        if self.process.exitcode != 0:
            raise UserError(
                f"{name}: its process was killed (exit code {self.process.exitcode}; out of memory?); the same command "
                "goes on from its last checkpoint"
            )
        result: dict[str, Any] = read_json(self.job.result)
        return result


def _start(job: Job, device: str) -> _Worker:
    context = multiprocessing.get_context("spawn")
    messages, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(job, device, sender))
    process.start()
    sender.close()  # the other end is then at its end when the process is
    return _Worker(process, job, device, messages)


def _work(job: Job, device: str, sender: Connection) -> None:
    """A job in a process that ends with the one that made it, however that ends: nobody would know of its result."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        run_job(job, device)
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGINT)  # the command says so
    except UserError as error:
        sender.send((True, str(error)[-_LONGEST:]))
    except Exception:
        sender.send((False, traceback.format_exc()[-_LONGEST:]))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
