"""The jobs of an ablation in processes of their own, each on a device that is free. No torch at import."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

from natsl.config import TRAINING_VERSION
from natsl.errors import UserError
from natsl.files import read_json
from natsl.search.ablation.job import Job, run_job


def stored_results(jobs: Sequence[Job]) -> tuple[list[dict[str, Any]], list[Job]]:
    """Results that are there already, and the jobs that have none.

    ``UserError`` if a result is of other text, or if jobs are left and a result is of another way of training.
    """
    results, waiting = [], []
    for job in jobs:
        stored = read_json(job.result) if job.result.exists() else {}
        if stored.get("fingerprint") != job.fingerprint():
            waiting.append(job)
            continue
        if stored["text"] != job.text:
            raise UserError(f"{job.result} is of other text than data.path holds now: choose another name")
        results.append(stored)
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

    A job gets the device of the one that has finished before it.
    """
    waiting = deque(jobs)
    if not waiting:
        return
    free = deque(devices[slot % len(devices)] for slot in range(min(workers, len(waiting))))
    running: dict[Future[dict[str, Any]], str] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(free), mp_context=context, max_tasks_per_child=1) as pool:
        try:
            while waiting or running:
                while waiting and free:
                    device = free.popleft()
                    running[pool.submit(_work, waiting.popleft(), device)] = device
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    free.append(running.pop(future))
                    yield future.result()
        except BaseException:
            for child in multiprocessing.active_children():  # else the pool would wait for all jobs
                child.terminate()
            raise


def _work(job: Job, device: str) -> dict[str, Any]:
    """A job in a process that ends with the one that made it, however that ends: nobody would know of its result."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    return run_job(job, device)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
