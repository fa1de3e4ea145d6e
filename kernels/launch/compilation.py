"""Triton kernels compiled ahead of their first launch, all at the same time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

_collecting = False  # whether launches are only collected


def collecting() -> bool:
    """Whether kernels are to be compiled and not launched (``Compilation.collect``)."""
    return _collecting


class Compilation:
    """Triton kernels to be compiled, collected by running code whose launches do nothing."""

    def __init__(self) -> None:
        self._jobs: dict[tuple[Any, str, int], str] = {}  # (jit function, its key, device) → specialisation
        self.failures: dict[str, str] = {}  # kernel → why it does not compile

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Inside the ``with`` block no kernel is launched and none compiled: outputs stay unwritten.

        What runs inside may not look at values. Kernels that this process has compiled are not collected.
        """
        from triton import knobs
        from triton.runtime.jit import JITFunction

        launch, hook = JITFunction.run, knobs.runtime.jit_cache_hook

        def only_compile(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            return launch(self, *arguments, grid=grid, warmup=True, **options)

        def collect_job(
            *, key: str, repr: str, fn: Any, compile: dict[str, Any], is_manual_warmup: bool, already_compiled: bool
        ) -> bool:
            self._jobs[fn.jit_function, key, compile["device"]] = compile["specialization_data"]
            return True  # stands for: done, do not compile

        global _collecting
        JITFunction.run, knobs.runtime.jit_cache_hook, _collecting = only_compile, collect_job, True
        try:
            yield
        finally:
            JITFunction.run, knobs.runtime.jit_cache_hook, _collecting = launch, hook, False

    def run(self, workers: int | None = None) -> int:
        """Compile what was collected, in ``workers`` threads (default: one per core); returns how many did compile.

        Triton works outside of Python's lock for all but some hundredths of a second per kernel. What does not compile
        is in ``failures``.
        """
        on_gpu = torch.cuda.is_available()

        def compile_one(job: tuple[tuple[Any, str, int], str]) -> bool:
            (function, _, device), specialisation = job
            if on_gpu:  # a setting of the thread
                torch.cuda.set_device(device)
            try:
                kernel = function.preload(specialisation)
                if on_gpu:
                    kernel[1, 1, 1]  # loads it and builds its launcher, which Triton leaves to the first launch
            except Exception as error:  # whatever the compiler raises, the others go on
                lines = str(error).strip().splitlines() or [type(error).__name__]
                self.failures[f"{function.module}.{function.__name__}"] = lines[0]
                return False
            return True

        jobs = list(self._jobs.items())
        self._jobs.clear()
        with ThreadPoolExecutor(workers or os.cpu_count() or 1) as threads:
            return sum(threads.map(compile_one, jobs))


def compile_ahead(function: Callable[[], object], workers: int | None = None) -> int:
    """Compile all Triton kernels that ``function`` launches, at the same time, launching none; returns how many.

    ``function`` runs with outputs that nobody writes, so it may not look at values. Does nothing under Triton's
    interpreter. A kernel that does not compile raises at its first launch.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return 0
    compilation = Compilation()
    with compilation.collect():
        function()
    return compilation.run(workers)
