"""Specialisation: the weights of a supernet trained on under one of its policies, before that is exported."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from natsl import __version__, checkpoint
from natsl.config import ModelConfig, SupernetConfig, TrainConfig
from natsl.data import TaskData, load_text
from natsl.errors import UserError
from natsl.files import read_json, to_plain
from natsl.load import Choice, load_choice, read_specialised, stored_data
from natsl.model import RoutedLM
from natsl.record import DataRecord
from natsl.resume import differences
from natsl.run import Run
from natsl.search.gain import compare
from natsl.search.source import known
from natsl.space.policy import RoutingPolicy
from natsl.tasks import TEXT_OPTIONS, DataConfig
from natsl.tracking import Tracker
from natsl.train import Specialisation, TrainRecipe, fit

# Of the supernet's peak learning rate and of its steps, where the user gives none.
RATE, STEPS = 0.3, 0.5
WARM_UP = 0.1  # of the steps


@dataclass(frozen=True)
class Settings:
    """The sections of a training."""

    model: ModelConfig
    data: DataConfig
    supernet: SupernetConfig
    train: TrainConfig


@dataclass(frozen=True)
class Source:
    """What a specialisation begins with: a run's finished weights, one policy, and where both are from.

    ``record``: as ``load_choice`` gives it. ``trained``: that of the checkpoint.
    """

    run: Run
    model: RoutedLM
    policy: RoutingPolicy
    record: Mapping[str, Any]
    trained: Mapping[str, Any]

    @classmethod
    def load(cls, choice: Choice) -> Source:
        """What a choice names; ``UserError`` for what ``load_choice`` refuses and a supernet that is not finished."""
        model, policy, record = load_choice(choice)
        run = Run.open(str(choice.run), choice.root, create=False)
        trained = read_json(run.supernet / f"step-{record['checkpoint']['step']:06d}.json")
        if not trained.get("finished"):
            raise UserError(f"the supernet of run {run.name!r} is not trained to its end: resume that run first")
        return cls(run, model, policy, record, trained)

    def settings(self, given: Settings, chosen: Collection[str]) -> Settings:
        """The settings of a specialisation: those of the run, with the learning rate and the schedule of a fine-tuning.

        ``chosen``: dotted names of the options in ``given`` that the user has set. Those of ``train`` are honoured but
        for its precision, and so is where the text is; ``UserError`` for others that are not those of the run.
        """
        theirs = Settings(
            ModelConfig.stored(self.trained["model"]),
            stored_data(self.run.name, str(self.run.path.parent), None),
            SupernetConfig(**known(self.trained.get("supernet", {}), SupernetConfig)),
            TrainConfig(**known(self.trained.get("train", {}), TrainConfig)),
        )
        free = {f"data.{name}" for name in TEXT_OPTIONS}
        free |= {f"train.{name}" for name in vars(theirs.train) if name != "precision"}
        for section, stored in vars(theirs).items():
            config = getattr(given, section)
            for name, old, new in differences(f"{section}.", to_plain(stored), config, type(config)()):
                if name in chosen and name not in free:
                    raise UserError(f"{name} = {new!r}, but run {self.run.name!r} has {old!r}: leave it out")
        text = {name: getattr(given.data, name) for name in TEXT_OPTIONS if f"data.{name}" in chosen}
        supernet = replace(theirs.supernet, route_noise=0.0)  # the routes are to be those of the policy
        own = {name: value for name, value in vars(given.train).items() if f"train.{name}" in chosen}
        return Settings(theirs.model, replace(theirs.data, **text), supernet, fine_tuning(theirs.train, own))

    def data(self, settings: DataConfig) -> TaskData:
        """The run's data; ``UserError`` if the text is not what its supernet was trained on."""
        name, record = self.run.name, DataRecord.read(self.run.text)
        if record is None:
            raise UserError(f"run {name!r} is of an older natsl and does not say which text it was trained on")
        if record.trained.text != record.text:
            raise UserError(
                f"the supernet of run {name!r} was trained on other text than the run was judged on: it can be "
                "specialised only on the text that it was trained on"
            )
        text = load_text(settings.path, settings.text_rules(str(self.run.path.parent), record.runs))
        difference = record.difference(text)
        if difference is not None:
            raise UserError(
                f"the text is not what run {name!r} was trained on: {difference}; data.path=<path> names where that is"
            )
        return TaskData(settings, text, int(self.trained["model"]["vocab_size"]))


def fine_tuning(theirs: TrainConfig, own: Mapping[str, Any]) -> TrainConfig:
    """How weights that were trained as ``theirs`` says are trained on; ``own``: fields that the user has set.

    ``RATE`` of the peak learning rate, ``STEPS`` of the steps, warm-up and decay to zero; all else stays as it was.
    """
    rate = own.get("lr", RATE * theirs.lr)
    steps = own.get("steps", max(1, round(STEPS * theirs.steps)))
    schedule: dict[str, Any] = {
        "lr": rate,
        "router_lr": None if theirs.router_lr is None else theirs.router_lr * rate / theirs.lr,
        "lr_final": 0.0,
        "steps": steps,
        "warmup_steps": round(WARM_UP * steps),
    }
    return replace(theirs, **{**schedule, **own})


def specialise(
    run: Run, source: Source, data: TaskData, recipe: TrainRecipe, device: torch.device, tracker: Tracker
) -> dict[str, Any]:
    """Train the source's weights under its policy in a run of its own, or resume that, and measure what it gained.

    ``recipe``: made by ``recipe_of``. ``claim`` was called before. Returns what ``specialise.json`` holds in the end.
    """
    net = fit(run, source.model.config, data, recipe, device, tracker, source.model)
    policy, report = read_specialised(run)
    step = checkpoint.steps(run.supernet)[-1]
    made = {"step": step, "sha256": read_json(run.supernet / f"step-{step:06d}.json")["sha256"]}
    if report.get("checkpoint") != made:
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        report |= {"natsl": __version__, "date": when, "checkpoint": made}
        report |= compare(source.model.to(device), net, policy, data)
        run.write_json(run.specialised, {"policy": policy.to_dict(), **report})
    return report


def recipe_of(source: Source, settings: Settings, seed: int) -> TrainRecipe:
    """How a source is specialised."""
    made_from, before = source.record["checkpoint"], source.trained.get("specialised") or {}
    seen = made_from["step"] + before.get("steps", 0)  # of the supernet, if the source was specialised itself
    special = Specialisation(source.policy, made_from["sha256"], seen)
    return TrainRecipe(settings.train, settings.supernet, seed, special)


def claim(run: Run, source: Source) -> None:
    """Note in a run what is specialised in it; ``UserError`` if that is something else already."""
    made_from, name = source.record["checkpoint"], source.run.name
    if run.specialised.exists() and checkpoint.steps(run.supernet):
        policy, begun = read_specialised(run)
        if policy != source.policy:
            raise UserError(
                f"name = {run.name!r} is specialised for the policy {policy.describe()} ({policy.digest()}), not for "
                f"{source.policy.describe()} ({source.policy.digest()}): choose another name"
            )
        if begun["supernet"] != made_from:
            raise UserError(
                f"the supernet of run {name!r} is no longer the one that {run.name!r} was begun with: choose another "
                "name"
            )
        return
    names = {"pick": source.record.get("id"), "policy_file": source.record.get("policy_file")}
    begun = {"run": name, **names, "digest": source.policy.digest(), "supernet": made_from}
    run.write_json(run.specialised, {"policy": source.policy.to_dict(), **begun})
