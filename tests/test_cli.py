"""The commands' options: strict keys and types, safe config files, one line for a mistake, help, sweeps, devices."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from natsl.cli.commands import ExportConfig, TrainRunConfig, VerifyConfig
from natsl.cli.main import run_main, user_line
from natsl.config import Sandwich
from natsl.errors import UserError
from natsl.model import RoutedLM, count_parameters
from natsl.search.config import SearchRunConfig
from natsl.search.samplers import Sampler
from natsl.space.check import InvalidValueError
from natsl.space.policy import Op

ROOT = Path(__file__).parents[1]


@dataclass
class Outcome:
    """What one command did."""

    code: int
    out: str
    err: str
    jobs: list[SearchRunConfig]

    @property
    def job(self) -> SearchRunConfig:
        assert self.code == 0, self.err
        assert len(self.jobs) == 1
        return self.jobs[0]


Command = Callable[..., Outcome]


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the search command's options, in an empty folder that must stay empty, up to the call of its function."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def call(*arguments: str, does: Callable[[SearchRunConfig], int | None] | None = None) -> Outcome:
        jobs: list[SearchRunConfig] = []

        def function(config: SearchRunConfig) -> int | None:
            jobs.append(config)
            return None if does is None else does(config)

        monkeypatch.setattr(sys, "argv", ["natsl-search", *arguments])
        code: object = 0
        try:
            run_main("search", SearchRunConfig, function)
        except SystemExit as ended:
            code = ended.code
        assert isinstance(code, int)
        assert os.getcwd() == str(folder)
        assert list(folder.iterdir()) == []
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err, jobs)

    return call


def mistake(outcome: Outcome) -> str:
    """The one line that a user's mistake gets."""
    assert outcome.code == 2
    assert outcome.jobs == []
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert "Traceback" not in outcome.err
    return outcome.err.removeprefix("error: ").strip()


def test_the_default_is_the_tiny_preset(search: Command) -> None:
    job = search().job
    assert type(job) is SearchRunConfig
    assert job.model.associative_init
    assert job.model.layers == [Op.routed] * 3
    assert job.data.tasks == {"mqar": 1.0}
    assert type(job.data.tasks) is dict
    assert type(job.model.layers) is list


def test_values_arrive_with_their_types(search: Command) -> None:
    job = search(
        "name=first",
        "seed=7",
        "train.lr=1e-3",
        "supernet.sandwich=accumulate",
        "model.layers=[delta,routed]",
        "search.objectives=[val_loss,kept_fraction]",
        "search.constraints={val_loss:2}",
        "data.path=null",
    ).job
    assert (job.name, job.seed, job.train.lr) == ("first", 7, 1e-3)
    assert job.supernet.sandwich is Sandwich.accumulate
    assert job.model.layers == [Op.delta, Op.routed]
    assert job.search.constraints == {"val_loss": 2.0}


@pytest.mark.parametrize(
    ("overrides", "tasks"),
    [
        (["data.tasks={bytes:1}"], {"bytes": 1.0}),
        (["+data.tasks={bytes:1}"], {"mqar": 1.0, "bytes": 1.0}),
        (["data.tasks.bytes=2"], {"mqar": 1.0, "bytes": 2.0}),
        (["data.tasks={bytes:1}", "data.tasks.needle=3"], {"bytes": 1.0, "needle": 3.0}),
        (["data.tasks.needle=3", "~data.tasks.mqar"], {"needle": 3.0}),
        (["experiment=bytes", "data.tasks.bytes=4"], {"mqar": 0.0, "bytes": 4.0}),
    ],
    ids=["replaced", "merged", "entry", "then an entry", "removed", "over a preset"],
)
def test_dictionaries(overrides: list[str], tasks: dict[str, float], search: Command) -> None:
    assert search(*overrides).job.data.tasks == tasks


@pytest.mark.parametrize("prefix", ["", "+", "++"])
@pytest.mark.parametrize("key", ["nme", "search.foo", "search.space.opps", "model.wdith", "data.mqar.x.y", "a/b"])
def test_unknown_keys(prefix: str, key: str, search: Command) -> None:
    line = mistake(search(f"{prefix}{key}=1"))
    assert "unknown option" in line
    assert key.removesuffix(".y") in line


def test_a_close_name_is_suggested(search: Command) -> None:
    assert "did you mean search.n_trials?" in mistake(search("+search.n_trial=1"))
    assert "did you mean train.steps?" in mistake(search("steps=1"))
    assert "did you mean search?" in mistake(search("serach.workers=2"))


MISTAKES = {
    "text for an integer": ("train.steps=abc", "train.steps: Value 'abc'"),
    "fraction for an integer": ("train.steps=1.5", "train.steps: Value '1.5'"),
    "text for a flag": ("model.rope=maybe", "model.rope: Value 'maybe'"),
    "text for a number in a dictionary": ("data.tasks.mqar=x", "data.tasks.mqar: Value 'x'"),
    "unknown choice": ("search.sampler=foo", "search.sampler: Invalid value 'foo', expected one of"),
    "unknown choice in a list": ("model.layers=[routed,foo]", "Invalid value 'foo', expected one of"),
    "text for a list": ("model.layers=routed", "model.layers"),
    "list for text": ("name=[a]", "name"),
    "text for a section": ("search=5", "search"),
    "unknown key in a section": ("search={foo:1}", "search.foo"),
    "unknown key in an added section": ("+search={foo:1}", "unknown option 'search.foo'"),
    "null": ("seed=null", "seed"),
    "no preset": ("experiment=null", "experiment=null is not allowed: give the name of a preset"),
    "below its bound": ("search.n_trials=-3", "search.n_trials = -3 is not allowed: it must be an integer ≥ 1"),
    "learning rate": ("train.lr=-1", "train.lr = -1.0 is not allowed: it must be > 0"),
    "chunk size": ("model.chunk_size=48", "model.chunk_size = 48 is not allowed"),
    "no objectives": ("search.objectives=[]", "search.objectives = [] is not allowed"),
    "budget": ("search.space.budget_max=1.2", "1.2"),
    "heads that do not divide": ("model.softmax_per_head=3", "model.key_dim = 16 is not allowed"),
    "unknown preset": ("model=big", "the presets are 340m, 760m, small, tiny"),
    "preset that leads out": ("model=../search", "model = '../search' is not allowed"),
    "preset twice": ("+model=tiny", "model"),
    "below a value": ("name.x=1", "name is a single value"),
    "removed option": ("~seed", "only entries of dictionaries can be removed"),
    "symbols": ("seed=(", "seed=( cannot be read: put a value with spaces or symbols in quotes"),
    "no value": ("seed", "'seed' is not an option: options are written name=value (--help lists all)"),
    "no name": ("runs/x", "'runs/x' is not an option: options are written name=value (--help lists all)"),
    "no value in a sweep": ("-m runs/x", "'runs/x' is not an option: options are written name=value"),
    "no key": ("=3", "must be a string"),
    "sweep without -m": ("seed=1,2", "--multirun"),
    "missing variable": ("data.path=${oc.env:NATSL_NO_SUCH}", "NATSL_NO_SUCH"),
    "missing reference": ("data.path=${nowhere}", "data.path: Interpolation key 'nowhere' not found"),
    "open reference": ("name='${'", "name"),
    "target": ("+x._target_=os.system", "'_target_' is not allowed"),
    "target in a dictionary": ("data.tasks={_target_:1}", "'_target_' is not allowed"),
    "target in a list": ("search.objectives=[{_target_:os.system}]", "'_target_' is not allowed"),
    "Hydra's launcher": ("hydra/launcher=basic", "Hydra's own settings are fixed"),
    "Hydra's launcher's target": ("hydra.launcher._target_=os.system", "'_target_' is not allowed"),
    "Hydra's callbacks": ("+hydra.callbacks.x={a:1}", "Hydra's own settings are fixed"),
    "Hydra's logging": ("hydra.job_logging.handlers.x.class=os.system", "Hydra's own settings are fixed"),
    "Hydra's search path": ("hydra.searchpath=[pkg://antigravity]", "Hydra's own settings are fixed"),
    "pickle": ("--experimental-rerun=x.pickle", "it would execute a pickle"),
    "other folder of configs": ("--config-path=/tmp", "--config-dir"),
    "missing folder of configs": ("--config-dir=/nowhere", "there is no such folder"),
    "missing config": ("--config-name=nope", "nope"),
}


@pytest.mark.parametrize(("override", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_get_one_line(override: str, message: str, search: Command) -> None:
    assert message in mistake(search(*override.split(" ")))


@pytest.mark.parametrize("flags", [["--cfg", "job"], ["--info", "defaults"]], ids=lambda flags: flags[0])
def test_mistakes_get_one_line_where_hydra_shows_something(flags: list[str], search: Command) -> None:
    assert MISTAKES["no preset"][1] in mistake(search(*flags, "experiment=null"))


def test_an_unknown_flag(search: Command) -> None:
    outcome = search("--frobnicate")
    assert outcome.code == 2
    assert "unrecognized arguments: --frobnicate" in outcome.err


@pytest.mark.parametrize("key", ["hydra.run.dir", "hydra.sweep.dir", "hydra.output_subdir", "hydra.job.chdir"])
def test_folders_of_hydra_have_no_effect(key: str, search: Command, tmp_path: Path) -> None:
    value = "true" if key == "hydra.job.chdir" else "../elsewhere"
    outcome = search(f"{key}={value}")
    assert outcome.job.name == "search"
    assert f"note: {key} has no effect" in outcome.err
    assert not (tmp_path / "elsewhere").exists()


def test_what_must_be_given(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["natsl-export"])
    with pytest.raises(SystemExit) as ended:
        run_main("export", ExportConfig, lambda config: None)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: run must be given: run=...\n"


def test_a_folder_without_its_option(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_main("verify", VerifyConfig, lambda config: None, ["runs/x"])
    assert ended.value.code == 2
    text = "error: 'runs/x' is not an option: options are written name=value, such as export=... (--help lists all)\n"
    assert capsys.readouterr().err == text


def yaml_bomb() -> str:
    lines = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    lines += [f"{b}: &{b} [{','.join(['*' + a] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    return "\n".join(lines)


BUILT_ON = "defaults:\n  - search\n  - _self_\n"
FILES = {
    "python tag": (BUILT_ON + 'name: !!python/object/apply:os.system ["touch pwned"]', "YAML tag"),
    "other tag": (BUILT_ON + "name: !foo x", "YAML tag '!foo'"),
    "binary tag": (BUILT_ON + "name: !!binary aGk=", "YAML tag"),
    "target": (BUILT_ON + "data: {_target_: os.system}", "'_target_' is not allowed"),
    "hydra section": (BUILT_ON + "hydra: {run: {dir: ../x}}", "'hydra' is not allowed"),
    "hydra package": ("# @package hydra.launcher\n_x: 1", "'@package hydra' is not allowed"),
    "bomb": (BUILT_ON + yaml_bomb(), "expands to more than"),
    "alias to itself": ("a: &a [*a]", "alias to itself"),
    "large": ("name: " + "x" * (1 << 20), "is larger than 1048576 bytes"),
    "deep": ("name: " + "[" * 20000, "nested too deeply"),
    "not UTF-8": ("name: \udcff", "is not UTF-8 (byte 6)"),
    "not YAML": ("a: [1\nb: {", "is not valid YAML"),
    "list": ("- a", "user"),
    "empty": ("", "begin the file with"),
    "without a preset": ("name: x", "begin the file with"),
    "unknown key": (BUILT_ON + "search: {foo: 1}", "search.foo: Key 'foo' not in 'SearchConfig'"),
    "wrong type": (BUILT_ON + "seed: abc", "seed: Value 'abc'"),
    "out of bounds": (BUILT_ON + "seed: -1", "seed = -1 is not allowed"),
}


@pytest.mark.parametrize(("content", "message"), FILES.values(), ids=FILES.keys())
def test_bad_config_files(content: str, message: str, search: Command, tmp_path: Path) -> None:
    (tmp_path / "user.yaml").write_bytes(content.encode(errors="surrogateescape"))
    assert message in mistake(search(f"--config-dir={tmp_path}", "--config-name=user"))
    assert not list(tmp_path.rglob("pwned"))


def test_config_files_of_the_user(search: Command, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("width: &w 128\nmlp_width: *w\n")
    (tmp_path / "user.yaml").write_text(BUILT_ON + "name: mine\nsearch: {n_trials: 7}\n")
    job = search(f"--config-dir={tmp_path}", "--config-name=user", "model=mine", "seed=3").job
    assert (job.name, job.search.n_trials, job.seed, job.model.width, job.model.mlp_width) == ("mine", 7, 3, 128, 128)
    (tmp_path / "model" / "mine.yaml").write_text("wdith: 128\n")
    assert "model.wdith: Key 'wdith' not in 'ModelConfig'" in mistake(search(f"--config-dir={tmp_path}", "model=mine"))


def test_sweep(search: Command) -> None:
    outcome = search("-m", "seed=1,2", "name=s${seed}", "data.tasks={bytes:1}")
    assert outcome.code == 0
    assert [(job.name, job.seed, job.data.tasks) for job in outcome.jobs] == [
        ("s1", 1, {"bytes": 1.0}),
        ("s2", 2, {"bytes": 1.0}),
    ]
    assert "job 2 of 2" in outcome.err


def test_a_sweep_is_checked_before_it_starts(search: Command) -> None:
    assert "different names" in mistake(search("-m", "seed=1,2"))
    assert "seed = -1" in mistake(search("-m", "seed=1,-1", "name=s${seed}"))
    assert "unknown option 'foo'" in mistake(search("-m", "foo=1,2"))


def test_a_sweep_stops_at_a_failed_job(search: Command) -> None:
    outcome = search("-m", "seed=1,2", "name=s${seed}", does=lambda config: 3)
    assert (outcome.code, len(outcome.jobs)) == (3, 1)


def raise_(error: BaseException) -> Callable[[SearchRunConfig], int | None]:
    def function(config: SearchRunConfig) -> int | None:
        raise error

    return function


def test_exit_codes(search: Command) -> None:
    assert search(does=lambda config: None).code == 0
    assert search(does=lambda config: 4).code == 4
    outcome = search(does=raise_(UserError("no such\nthing")))
    assert (outcome.code, outcome.err) == (2, "error: no such thing\n")
    outcome = search(does=raise_(InvalidValueError("x = 3 is not allowed")))
    assert (outcome.code, outcome.err) == (2, "error: x = 3 is not allowed\n")
    outcome = search(does=raise_(OSError(errno.ENOSPC, "No space left on device", "runs/x")))
    assert (outcome.code, outcome.err) == (1, "error: No space left on device: runs/x\n")
    outcome = search(does=raise_(KeyboardInterrupt()))
    assert (outcome.code, outcome.err) == (130, "interrupted\n")
    outcome = search(does=lambda config: os.kill(os.getpid(), signal.SIGTERM))
    assert (outcome.code, outcome.err) == (143, "terminated\n")
    outcome = search(does=raise_(MemoryError()))
    assert outcome.code == 1
    assert outcome.err.startswith("error: out of memory: use smaller batches")


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, KeyError, AssertionError])
def test_a_defect_keeps_its_traceback_and_asks_for_a_report(kind: type[Exception], search: Command) -> None:
    outcome = search(does=raise_(kind("broken")))
    assert outcome.code == 1
    assert "Traceback" in outcome.err
    assert f"{kind.__name__}: " in outcome.err
    assert outcome.err.endswith("please report it with the lines above\n")


@pytest.mark.parametrize("error", [UserError("mine"), OSError(errno.EACCES, "Permission denied", "x")])
def test_nobody_is_asked_to_report_a_mistake(error: Exception, search: Command) -> None:
    assert "report" not in search(does=raise_(error)).err


def test_a_value_error_of_a_library_is_a_defect(search: Command) -> None:
    def library(config: SearchRunConfig) -> None:
        torch.distributions.Normal(torch.zeros(1), -torch.ones(1), validate_args=True)  # torch.compile turns it off

    outcome = search(does=library)
    assert outcome.code == 1
    assert "Traceback" in outcome.err


def test_full_errors_on_request(search: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    outcome = search(does=raise_(UserError("mine")))
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert outcome.err.endswith("error: mine\n")


def test_secrets_do_not_show(search: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    outcomes = [
        search("search.n_trials=${oc.env:WANDB_API_KEY}"),
        search("--cfg", "job", "--resolve", "name=${oc.env:WANDB_API_KEY}"),
        search(does=raise_(RuntimeError("0123456789abcdef"))),
        search("--cfg=job", "search.storage='postgresql://me:0123456789abcdef@host/db'"),
    ]
    for outcome in outcomes:
        assert "0123456789abcdef" not in outcome.out + outcome.err
        assert "<removed>" in outcome.out + outcome.err


def test_warnings_are_one_line(search: Command) -> None:
    outcome = search(does=lambda config: warnings.warn("the checkpoint is passed over", stacklevel=1))
    assert outcome.err == "warning: the checkpoint is passed over\n"


def test_help_names_every_option(search: Command) -> None:
    outcome = search("--help")
    assert outcome.code == 0
    assert outcome.jobs == []
    for text in (
        "Usage: ",
        "Examples:",
        "model=340m | 760m | small | tiny",
        "experiment=bytes | needle | small | smoke | unaligned",
        "name=search",
        "model.layers=[routed,routed,routed]",
        "search.sampler=sweep",
        " | ".join(sampler.value for sampler in Sampler),
        "data.mqar.pair_share=0.25",
        "search.space.budget_max=1.0",
        "tracking.mode=offline",
        "--cfg job",
        "-m, --multirun",
    ):
        assert text in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 200
    assert "model.width=1024" in search("--help", "model=340m").out


def test_version(search: Command) -> None:
    assert search("--version").out == "natsl 0.1.0\n"


def test_show_config(search: Command) -> None:
    outcome = search("--cfg", "job", "seed=5", "data.tasks={bytes:1}")
    assert outcome.code == 0
    assert outcome.jobs == []
    assert "seed: 5\n" in outcome.out
    assert "  tasks:\n    bytes: 1.0\n" in outcome.out
    assert "hydra:" not in outcome.out
    assert "n_trials" in search("--cfg", "job", "--package", "search").out
    assert "search_schema" in search("--info", "defaults").out
    assert "hydra/launcher" in search("--hydra-help").out


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("mod", ["model=", "model."]),
        ("model=", ["model=340m", "model=760m", "model=small", "model=tiny"]),
        ("search.n_tr", ["search.n_trials="]),
        ("seed=1 train.st", ["train.steps="]),
        ("nonsense=1 train.st", []),
    ],
)
def test_shell_completion(typed: str, offered: list[str], search: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_LINE", f"natsl-search {typed}")
    outcome = search("-sc", "query=bash")
    assert (outcome.code, outcome.err) == (0, "")
    assert sorted(outcome.out.split()) == sorted(offered)
    assert "hydra_bash_completion" in search("-sc", "install=bash").out


def test_logs_are_lines_on_stderr(search: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")

    def does(config: SearchRunConfig) -> None:
        logger = logging.getLogger("natsl.anything")
        logger.debug("unseen")
        logger.info("a key is %s", "0123456789abcdef")
        logger.warning("beware")

    for _ in range(2):  # installed once, and for the stderr of now
        assert search(does=does).err == "note: a key is <removed>\nwarning: beware\n"


@pytest.mark.parametrize(
    ("preset", "millions"), [("tiny", (0.1, 0.2)), ("small", (20, 60)), ("340m", (335, 350)), ("760m", (735, 770))]
)
def test_model_presets(preset: str, millions: tuple[float, float], search: Command) -> None:
    config = search(f"model={preset}").job.model
    with torch.device("meta"):
        count = count_parameters(RoutedLM(config)) / 1e6
    assert millions[0] <= count <= millions[1]
    if preset in ("340m", "760m"):
        assert [i for i, kind in enumerate(config.layers) if kind is Op.routed] == [3, 7, 11, 15, 19, 20]
        assert len(config.layers) == 21
        assert (config.key_dim // config.softmax_per_head, config.value_dim // config.softmax_per_head) == (64, 128)
        assert config.softmax_heads == (12 if preset == "340m" else 18)


@pytest.mark.parametrize("experiment", ["bytes", "needle", "small", "smoke", "unaligned"])
def test_experiments_compose(experiment: str, search: Command) -> None:
    assert type(search(f"experiment={experiment}").job) is SearchRunConfig


def test_presets_of_other_commands_are_not_offered(search: Command) -> None:
    assert "the presets are bytes, needle, small, smoke, unaligned" in mistake(search("experiment=ablation"))


def test_presets_hold_differences_only(search: Command) -> None:
    """A preset that repeats a default hides later changes of that default."""
    import yaml  # type: ignore[import-untyped]

    from natsl.config import ModelConfig
    from natsl.files import to_plain

    default = to_plain(ModelConfig())
    for path in (ROOT / "conf" / "model").glob("*.yaml"):
        preset = yaml.safe_load(path.read_text())
        assert [key for key, value in preset.items() if default[key] == value] == []


def test_every_command_composes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["natsl-train", "name=x"])
    seen: list[TrainRunConfig] = []
    run_main("train", TrainRunConfig, seen.append)
    assert seen[0].name == "x"
    assert seen[0].model.associative_init


def test_user_line_of_a_defect() -> None:
    assert user_line(RuntimeError("x")) is None
    assert user_line(UserError("a\n b")) == "a b"
