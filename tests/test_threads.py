"""How many threads OpenMP gets and how they wait: what the system says, what the user says, and after a resume."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from natsl import checkpoint, threads
from natsl.threads import choose_threads, cpu_quota, other_work
from natsl.train import train_supernet
from tests.oracles import tiny_data
from tests.train_helpers import Killed, assert_equal, kill_at, make_model, recipe

# Of two cores, in ticks: user, nice, system, idle, iowait, irq, softirq, steal, guest, guest_nice.
BEFORE = """cpu  300 0 0 700 0 0 0 0 0 0
cpu0 100 0 0 400 0 0 0 0 0 0
cpu1 200 0 0 300 0 0 0 0 90 0
intr 1 2 3
"""
AFTER = """cpu  313 1 2 703 4 0 1 2 0 0
cpu0 100 0 0 404 6 0 0 0 0 0
cpu1 203 1 2 302 0 0 1 1 95 0

cpufreq 7
"""


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for ``/proc`` and, below ``cgroup``, for ``/sys/fs/cgroup``; torch seems not to be loaded.

    Nothing of the environment speaks of threads. Two cores.
    """
    monkeypatch.setattr(threads, "_PROC", tmp_path)
    monkeypatch.setattr(threads, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(threads, "_own_cores", lambda: {0, 1})
    monkeypatch.setattr(threads._Chosen, "here", False)  # so that what a test sets is taken back
    monkeypatch.setattr(sys, "modules", {k: v for k, v in sys.modules.items() if k != "torch"})
    for name in (threads.NUMBER, *threads.WAITING):
        monkeypatch.setenv(name, "")  # so that what a test sets is taken back
        monkeypatch.delenv(name)
    return tmp_path


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def use(monkeypatch: pytest.MonkeyPatch, cores: float | None) -> None:
    """Let other work use so many cores."""
    monkeypatch.setattr(threads, "other_work", lambda own: cores)


def chosen() -> dict[str, str]:
    choose_threads()
    return {name: os.environ[name] for name in (threads.NUMBER, *threads.WAITING) if name in os.environ}


@pytest.mark.parametrize(
    ("before", "after", "cores", "used"),
    [
        (BEFORE, AFTER, {0, 1}, 0.8),
        (BEFORE, AFTER, {0}, 0.0),
        (BEFORE, AFTER, {1, 64}, 0.8),
        (BEFORE, BEFORE, {0, 1}, 0.0),
        (BEFORE, AFTER, {64}, None),
        ("", "", {0, 1}, None),
        ("cpu0 a b c d\ncpuX 1 2 3 4\ncpu1\n\x00", AFTER, {0, 1}, None),
        (BEFORE, BEFORE.replace("cpu0 100", "cpu0 50"), {0, 1}, 0.0),
    ],
    ids=["two", "idle", "one unknown", "no tick", "none known", "empty", "garbage", "backwards"],
)
def test_other_work_is_read_from_the_times_of_the_cores(
    before: str, after: str, cores: set[int], used: float | None, system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(system, {"stat": before})
    monkeypatch.setattr(time, "sleep", lambda seconds: write(system, {"stat": after}))
    assert other_work(cores) == (None if used is None else pytest.approx(used))


def test_other_work_is_unknown_without_proc(system: Path) -> None:
    assert other_work({0, 1}) is None


V2, V1 = "0::/a/b\n", "9:name=systemd:/x\n4:cpu,cpuacct:/a/b\n3:memory:/m\n"


@pytest.mark.parametrize(
    ("cgroup", "files", "cores"),
    [
        (V2, {"cgroup/a/b/cpu.max": "150000 100000\n"}, 1.5),
        (V2, {"cgroup/a/b/cpu.max": "max 100000\n"}, None),
        (V2, {"cgroup/a/b/cpu.max": "max 100000\n", "cgroup/a/cpu.max": "300000 100000\n"}, 3.0),
        (V2, {"cgroup/a/b/cpu.max": "50000 100000\n", "cgroup/a/cpu.max": "300000 100000\n"}, 0.5),
        (V2, {"cgroup/c/cpu.max": "50000 100000\n"}, None),
        ("0::/\n", {"cgroup/cpu.max": "200000 100000\n"}, 2.0),
        ("0::/../../c\n", {"cgroup/cpu.max": "200000 100000\n"}, 2.0),
        (V2, {"cgroup/unified/a/cpu.max": "200000 100000\n"}, 2.0),
        (V2, {"cgroup/a/b/cpu.max": "many of them\n"}, None),
        (V2, {"cgroup/a/b/cpu.max": "100000 0\n"}, None),
        (V2, {"cgroup/a/b/cpu.max": "\n"}, None),
        (
            V1,
            {
                "cgroup/cpu,cpuacct/a/b/cpu.cfs_quota_us": "250000\n",
                "cgroup/cpu,cpuacct/a/b/cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
        (V1, {"cgroup/cpu/cpu.cfs_quota_us": "100000\n", "cgroup/cpu/cpu.cfs_period_us": "50000\n"}, 2.0),
        (V1, {"cgroup/cpu/a/b/cpu.cfs_quota_us": "-1\n", "cgroup/cpu/a/b/cpu.cfs_period_us": "100000\n"}, None),
        (V1, {"cgroup/cpu/a/b/cpu.cfs_quota_us": "100000\n"}, None),
        ("nonsense\n::\n:cpu\n\n", {"cgroup/a/b/cpu.max": "100000 100000\n"}, None),
        ("", {}, None),
    ],
    ids=[
        "v2",
        "v2 max",
        "v2 of the parent",
        "v2 lowest",
        "v2 of another",
        "v2 in a container",
        "v2 outside the namespace",
        "v2 beside v1",
        "v2 garbage",
        "v2 period 0",
        "v2 empty",
        "v1",
        "v1 in a container",
        "v1 no limit",
        "v1 half",
        "garbage",
        "no file",
    ],
)
def test_the_quota_is_that_of_the_own_cgroups(
    cgroup: str, files: dict[str, str], cores: float | None, system: Path
) -> None:
    write(system, {"self/cgroup": cgroup, **files})
    assert cpu_quota() == cores


@pytest.mark.parametrize(
    ("used", "passive"),
    [(0.0, False), (0.2, False), (0.21, True), (1.0, True), (2.0, True), (None, False)],
    ids=str,
)
def test_threads_wait_passively_beside_other_work(
    used: float | None,
    passive: bool,
    system: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    use(monkeypatch, used)
    with caplog.at_level(logging.INFO, logger="natsl"):
        assert chosen() == ({"OMP_WAIT_POLICY": "passive"} if passive else {})
    notes = [f"other work uses {used:.1f} of 2 cores: threads wait without spinning"] if passive else []
    assert caplog.messages == notes


@pytest.mark.parametrize(
    ("quota", "number"),
    [("100000 100000", "1"), ("190000 100000", "1"), ("1000 100000", "1"), ("200000 100000", None), ("max 1", None)],
)
def test_a_quota_limits_the_number_of_threads(
    quota: str, number: str | None, system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(system, {"self/cgroup": V2, "cgroup/a/b/cpu.max": quota})
    use(monkeypatch, 0.0)
    assert chosen() == ({} if number is None else {"OMP_NUM_THREADS": number})


@pytest.mark.parametrize("name", threads.WAITING)
def test_a_way_of_waiting_that_the_user_has_set_stays(name: str, system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, 2.0)
    monkeypatch.setenv(name, "77")
    assert chosen() == {name: "77"}


@pytest.mark.parametrize(
    ("number", "passive"), [("1", False), ("2", True), ("3,1", True), ("", True), ("lots", True)], ids=repr
)
def test_a_number_that_the_user_has_set_stays(
    number: str, passive: bool, system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(system, {"self/cgroup": V2, "cgroup/a/b/cpu.max": "100000 100000"})
    use(monkeypatch, 1.0)
    monkeypatch.setenv(threads.NUMBER, number)
    policy = {"OMP_WAIT_POLICY": "passive"} if passive else {}
    assert chosen() == {"OMP_NUM_THREADS": number} | policy


@pytest.mark.parametrize(("number", "passive"), [(3, False), (6, True)], ids=str)
def test_threads_that_find_a_core_each_may_spin(
    number: int, passive: bool, system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "_own_cores", lambda: set(range(8)))
    use(monkeypatch, 4.0)
    monkeypatch.setenv(threads.NUMBER, str(number))
    assert ("OMP_WAIT_POLICY" in chosen()) == passive


@pytest.mark.parametrize("cores", [set(), {5}], ids=["macOS", "one core"])
def test_nothing_is_set_without_cores_to_share(cores: set[int], system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_own_cores", lambda: cores)
    use(monkeypatch, 1.0)
    assert chosen() == {}


def test_nothing_is_set_once_torch_is_loaded(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, 2.0)
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert chosen() == {}


# Runs the command of its arguments on cores that others use, and shows the environment when torch is first imported.
COMMAND = """
import os, sys
from natsl import threads
threads._own_cores = lambda: {0, 1, 2, 3}
threads.cpu_quota = lambda: 3.0
threads.other_work = lambda cores: 2.0

class Torch:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print("torch", os.environ.get("OMP_NUM_THREADS"), os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Torch)
from natsl.cli.main import main
main()
"""


def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in (threads.NUMBER, *threads.WAITING)}
    line = [sys.executable, "-c", code, *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False, env=inherited | environment)


NOTE = "note: other work uses 2.0 of 4 cores: threads wait without spinning\n"


@pytest.mark.parametrize("verb", ["train", "search", "generate", "bench"])
def test_a_command_chooses_before_torch_is_loaded(verb: str, tmp_path: Path) -> None:
    options = [] if verb == "bench" else [f"root={tmp_path}"]
    done = run(COMMAND, verb, *options, *(["run=r"] if verb == "generate" else []))
    assert (done.stdout, done.stderr) == ("torch 3 passive\n", NOTE)


def test_the_environment_of_a_command_wins(tmp_path: Path) -> None:
    done = run(COMMAND, "train", f"root={tmp_path}", OMP_NUM_THREADS="2", GOMP_SPINCOUNT="5")
    assert (done.stdout, done.stderr) == ("torch 2 None\n", "")
    done = run(COMMAND, "train", "-m", "name=a,b", f"root={tmp_path}", OMP_NUM_THREADS="4")
    assert (done.stdout, done.stderr.startswith(NOTE)) == ("torch 4 passive\n", True)


@pytest.mark.parametrize(
    "arguments",
    [["train", "--help"], ["train", "--cfg", "job"], ["--help"], ["train", "seed=-1"], ["bench", "--help"]],
    ids=" ".join,
)
def test_a_command_that_computes_nothing_does_not_look(arguments: list[str]) -> None:
    done = run(COMMAND, *arguments)
    assert "other work" not in done.stderr


def test_the_library_sets_nothing() -> None:
    code = "import os, natsl.threads, natsl.train; print([n for n in os.environ if n.startswith(('OMP', 'GOMP'))])"
    assert run(code).stdout == "[]\n"


@pytest.fixture
def two_threads() -> object:
    """Torch computes with two threads, and afterwards with as many as before."""
    with threads.threads_restored():
        torch.set_num_threads(2)
        yield


def cut_off(folder: Path) -> None:
    with pytest.raises(Killed):
        train_supernet(make_model(), tiny_data(), recipe(), folder, kill_at(5))


def test_a_resumed_training_takes_the_number_of_threads_it_began_with(
    two_threads: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unbroken = make_model()
    train_supernet(unbroken, tiny_data(), recipe(), tmp_path / "unbroken")
    cut_off(tmp_path / "broken")
    torch.set_num_threads(3)
    seen = []
    resumed = make_model(init=1)
    with caplog.at_level(logging.INFO, logger="natsl"):
        train_supernet(
            resumed, tiny_data(), recipe(), tmp_path / "broken", lambda _: seen.append(torch.get_num_threads())
        )
    assert caplog.messages == [
        "training goes on with 2 threads, as it began, so that its result stays the same (here it would be 3: for "
        "these train anew, under another name)"
    ]
    assert seen == [2, 2, 2]
    assert torch.get_num_threads() == 3
    assert checkpoint.load_model(tmp_path / "broken")[1]["threads"] == 2
    assert_equal(unbroken, resumed)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="natsl"):
        train_supernet(make_model(), tiny_data(), recipe(), tmp_path / "broken")
    assert caplog.messages == []  # nothing was left to train


@pytest.mark.parametrize("stored", [None, 0, "2", 3.0], ids=repr)
def test_checkpoints_that_do_not_say_the_number_change_nothing(
    stored: object, two_threads: None, tmp_path: Path
) -> None:
    cut_off(tmp_path)
    for path in tmp_path.glob("*.json"):
        record = json.loads(path.read_text())
        assert record.pop("threads") == 2
        path.write_text(json.dumps(record if stored is None else {**record, "threads": stored}))
    torch.set_num_threads(1)
    train_supernet(make_model(), tiny_data(), recipe(), tmp_path)
    assert checkpoint.load_model(tmp_path)[1]["threads"] == 1
