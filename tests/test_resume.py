"""A run that exists goes on under the options it was made with, or says which of them differ."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from natsl.cli.commands import TrainRunConfig
from natsl.config import TrainConfig
from natsl.errors import UserError
from natsl.files import read_config
from natsl.load import stored_data
from natsl.resume import FREE_ON_RESUME, check_resume, is_free_on_resume
from natsl.run import Run
from natsl.search.config import SearchConfig, SearchRunConfig
from natsl.search.outer.config import OuterRunConfig
from natsl.tasks import DataConfig
from natsl.tasks.mqar import MqarConfig


def leaves(config: Any, prefix: str = "") -> list[str]:
    """Dotted names of all options."""
    names = []
    for item in fields(config):
        value = getattr(config, item.name)
        names += leaves(value, f"{prefix}{item.name}.") if is_dataclass(value) else [f"{prefix}{item.name}"]
    return names


def stored(root: Path, config: Any) -> Run:
    """A run that has a checkpoint."""
    run = Run.open("r", root)
    run.write_config(config)
    run.supernet.mkdir()
    (run.supernet / "step-000002.json").write_text("{}")
    return run


COMMANDS = {"search": SearchRunConfig, "train": TrainRunConfig, "outer": OuterRunConfig}
OPTIONS = [(command, name) for command, kind in COMMANDS.items() for name in leaves(kind())]


@pytest.mark.parametrize(("command", "name"), OPTIONS, ids=[f"{command}-{name}" for command, name in OPTIONS])
def test_every_option_is_honoured_or_refused(command: str, name: str, tmp_path: Path) -> None:
    config = COMMANDS[command]()
    run = stored(tmp_path, config)
    plain = read_config(run.config)
    *sections, last = name.split(".")
    place = plain
    for section in sections:
        place = place[section]
    place[last] = "another"
    run.config.write_text(yaml.safe_dump(plain))
    before = run.config.read_bytes()
    if is_free_on_resume(name):
        assert check_resume(run, config) == {name}
    else:
        with pytest.raises(UserError, match=f"under other settings \\({name}: 'another' then, .* now\\): restore them"):
            check_resume(run, config)
    assert run.config.read_bytes() == before


def test_every_free_option_exists() -> None:
    names = {name for kind in COMMANDS.values() for name in leaves(kind())}
    for free in FREE_ON_RESUME:
        assert any(name == free or name.startswith(f"{free}.") for name in names), free


def test_a_run_that_has_stored_nothing_takes_new_options(tmp_path: Path) -> None:
    run = Run.open("r", tmp_path)
    check_resume(run, SearchRunConfig(seed=1))
    check_resume(run, SearchRunConfig(seed=2))
    assert read_config(run.config)["seed"] == 2


def test_an_older_run_without_todays_options_goes_on(tmp_path: Path) -> None:
    run = stored(tmp_path, SearchRunConfig(seed=1))
    plain = read_config(run.config)
    del plain["data"]["keys"], plain["search"]["local_share"], plain["train"]["precision"]
    plain["an option of then"] = 1
    run.config.write_text(yaml.safe_dump(plain))
    assert not check_resume(run, SearchRunConfig(seed=1))
    with pytest.raises(UserError, match=r"search.local_share: 0.35 then, 0.5 now"):
        check_resume(run, SearchRunConfig(seed=1, search=SearchConfig(local_share=0.5)))


def test_an_older_run_has_the_sequences_that_it_was_trained_on(tmp_path: Path) -> None:
    aligned = replace(SearchRunConfig(), data=DataConfig(mqar=MqarConfig(shift=False)))
    run = stored(tmp_path, aligned)
    plain = read_config(run.config)
    del plain["data"]["mqar"]["shift"], plain["data"]["needle"]["alphabet"]
    run.config.write_text(yaml.safe_dump(plain))
    assert not check_resume(run, aligned)
    assert stored_data("r", str(tmp_path), None) == aligned.data
    with pytest.raises(UserError, match=r"\(data.mqar.shift: False then, True now\)"):
        check_resume(run, SearchRunConfig())


def test_an_older_search_goes_on_with_judging_policies_on_everything(tmp_path: Path) -> None:
    run = stored(tmp_path, SearchRunConfig())
    plain = read_config(run.config)
    del plain["search"]["rungs"]
    run.config.write_text(yaml.safe_dump(plain))
    assert not check_resume(run, SearchRunConfig(search=SearchConfig(rungs=[1.0])))
    with pytest.raises(UserError, match=r"search.rungs: \[1.0\] then, \[0.25, 1.0\] now"):
        check_resume(run, SearchRunConfig())


def test_a_search_may_go_on_from_a_training_of_its_name(tmp_path: Path) -> None:
    training = TrainRunConfig(train=TrainConfig(steps=3))
    run = stored(tmp_path, training)
    config = SearchRunConfig(train=TrainConfig(steps=3), search=SearchConfig(n_trials=5, context=7))
    check_resume(run, config)
    with pytest.raises(UserError, match="seed: 0 then, 1 now"):
        check_resume(run, replace(config, seed=1))


def test_a_password_in_an_option_is_no_difference_and_not_shown(tmp_path: Path) -> None:
    address = "postgresql://me:hunter2hunter2@host/db"
    config = SearchRunConfig(search=SearchConfig(storage=address))
    run = stored(tmp_path, config)
    assert not check_resume(run, config)
    with pytest.raises(UserError, match="storage") as caught:
        check_resume(stored(tmp_path / "other", SearchRunConfig()), config)
    assert "hunter2" not in str(caught.value)
