"""What every test runs under: few threads, a fixed seed, poisoned memory, and nothing of the caller's accounts."""

from __future__ import annotations

import importlib.util
import logging
import os
import random
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter; it reads this when triton is imported. With one, an op's
# launches are replayed, as they are from the second call on, in the first call too.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton"):
        from tests.interpreter import speed_up

        speed_up()
else:
    from natsl.kernels.launch.replay import Replayed

    Replayed.replay_at_once = True

# Charts are drawn without a display, and no test can reach an account or a server of whoever runs it.
os.environ["MPLBACKEND"] = "Agg"
for name in [name for name in os.environ if name.startswith("WANDB_")]:
    del os.environ[name]

# In the background of a shell without job control SIGINT is ignored, also by the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

# Deterministic algorithms make torch.empty give NaN (integers: the largest value), so that a read of memory that nobody
# wrote shows in the result. An operation that has no deterministic algorithm may still run.
torch.use_deterministic_algorithms(True, warn_only=True)
assert torch.empty(3).isnan().all()


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    """A command line keeps notes from the root logger; the ``caplog`` of the next test must not get them twice."""
    yield
    logging.getLogger("natsl").propagate = True


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text of a user's, large enough for three splits."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"line {i}: the square of {i} is {i * i}\n" for i in range(3000)))
    return str(path)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, text: str) -> dict[str, Any]:
    """The results of a small search that nothing cut off."""
    from natsl.run import Run
    from natsl.search.pipeline import run_search
    from tests.test_pipeline import results, tiny

    root = tmp_path_factory.mktemp("straight")
    run_search(tiny(root, text))
    return results(Run.open("first", root, create=False))


@pytest.fixture
def no_picture() -> Iterator[None]:
    """Searches write an empty front.png, which takes a fourth of their time; ``test_png.py`` looks at pictures."""
    with pytest.MonkeyPatch.context() as patch:  # one of its own, which a test does not undo
        patch.setattr("natsl.search.pipeline.front_png", lambda front: b"")
        yield
