"""The commands: their options and what they do. Anything heavy is imported when a command runs."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from natsl.command import changed_options, command, run_options
from natsl.config import ModelConfig, Precision, SupernetConfig, TrainConfig, check_batch, check_chunks
from natsl.device import resolve_device
from natsl.errors import UserError
from natsl.files import check_name, output_folder, to_plain, user_path
from natsl.load import Choice
from natsl.resume import check_resume, differences
from natsl.run import Run
from natsl.space.check import check, check_counts
from natsl.space.policy import Op, RoutingPolicy
from natsl.tasks import CalibrationDataConfig, DataConfig
from natsl.tracking import TrackingConfig, start_tracker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from natsl.calibrate import MadeTable
    from natsl.search.config import SearchRunConfig
    from natsl.search.front import Front
    from natsl.serving import ServingSpeed
    from natsl.throughput import Speed, ThroughputConfig

CHECKED_BUDGETS = (0.05, 0.1, 0.25, 0.5)  # what a new calibration table is measured at


@dataclass
class TrainRunConfig:
    """Train one supernet into ``root/name``; a run that exists is resumed. ``device``: auto, cpu, cuda or cuda:<n>.

    ``specialise``: a run below ``root`` whose finished weights are trained on under one policy: ``pick`` (``knee``, an
    id of its front or its beginning; null: the knee) or ``policy`` (a JSON file). Model, data and supernet settings are
    then those of that run, and so is ``train`` except for what is given here and the schedule, which by default is .3
    of the learning rate and half of the steps, with warm-up and decay to zero.
    """

    name: str = "train"
    root: str = "runs"
    specialise: str | None = None
    pick: str | None = None
    policy: str | None = None
    seed: int = 0
    device: str = "auto"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    supernet: SupernetConfig = field(default_factory=SupernetConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        check_name(self.name, "name")
        check_counts(0, {"seed": self.seed})
        if self.specialise is not None:
            check_name(self.specialise, "specialise")
            check(self.specialise != self.name, "name", self.name, "that is the run to specialise: it stays as it is")
            self.choice()
        for option in ("pick", "policy"):
            value = getattr(self, option)
            check(value is None or self.specialise is not None, option, value, "it goes with specialise=<run>")

    def choice(self) -> Choice:
        """Weights and policy to specialise; ``ValueError`` for options that exclude each other."""
        return Choice(run=self.specialise, root=self.root, pick=self.pick, policy=self.policy)


class Choosing:
    """Options that name a model and a policy, by the names of the fields of ``Choice``."""

    def choice(self) -> Choice:
        """Model and policy; ``ValueError`` for options that exclude each other."""
        return Choice(**{item.name: getattr(self, item.name) for item in fields(Choice) if hasattr(self, item.name)})


@dataclass
class ExportConfig(Choosing):
    """Write one point of a run's front, or any other policy, as a model of its own; verify it in a fresh process.

    ``import natsl`` makes transformers know such a folder (``AutoModelForCausalLM.from_pretrained``). Layers that only
    use the delta rule lose the weights of softmax and router. ``run``: a run below ``root``. ``pick``: ``knee``, an id
    of the front, or the beginning of an id or of a policy's digest (null: the knee). ``policy``: a JSON file instead,
    which needs no front. ``calibration``: a table made by natsl calibrate instead of the run's own. ``name``: of the
    folder below ``root/run/export`` (null: the point's id or ``policy-<digest>``, and the calibration's name).
    ``overwrite`` replaces a folder that exists. ``dtype``: of the weights; those that routes depend on stay float32,
    and with bfloat16 the model computes in it. ``sequences``: so many of the test part of each task are copied into the
    folder, to be scored again by natsl verify (0: no text goes along).
    """

    run: str = "???"  # must be given
    root: str = "runs"
    pick: str | None = None
    policy: str | None = None
    calibration: str | None = None
    name: str | None = None
    overwrite: bool = False
    dtype: Precision = Precision.float32
    sequences: int = 8

    def __post_init__(self) -> None:
        self.choice()
        check_counts(0, {"sequences": self.sequences})


@dataclass
class VerifyConfig:
    """Repeat the checks of an exported folder, anywhere: one line for each, exit code 1 if one fails.

    ``export``: a folder made by natsl export. Files against their checksums; then, by natsl's own loader and by
    transformers where it is installed: the supernet's logits, reading in pieces, batches and padding against one pass,
    generation, and the scores of the sequences that the folder holds.
    """

    export: str = "???"  # must be given


@dataclass
class CalibrateConfig:
    """Make a calibration table of a run's supernet on other text: what turns a budget into a threshold of the router.

    The table that training made turns a budget into the fraction of chunks kept on training's kind of text; other text
    needs another table to be kept at the same fraction. ``run``: a run below ``root`` whose supernet is trained to its
    end. ``name``: the table goes to ``root/run/calibrations/<name>.json``, beside training's own, which stays as it is;
    ``calibration=<name>`` makes evaluate, generate and export use it. ``sequences``: how many to calibrate on, over all
    tasks; ``seed`` that they are drawn with (null for either: as in training).
    ``allow_other_data`` takes the run's own text also where it has changed, and the table says so. ``overwrite``
    replaces a table of that name.
    """

    run: str = "???"  # must be given
    name: str = "???"  # must be given
    root: str = "runs"
    data: CalibrationDataConfig = field(default_factory=CalibrationDataConfig)
    allow_other_data: bool = False
    sequences: int | None = None
    seed: int | None = None
    device: str = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.name != "???":
            check_name(self.name, "name")
        if self.sequences is not None:
            check_counts(1, {"sequences": self.sequences})
        if self.seed is not None:
            check_counts(0, {"seed": self.seed})


def run_search(config: SearchRunConfig) -> None:
    """Train a supernet, search its policies and report the front; see ``natsl.search.pipeline``."""
    arguments = sys.argv[1:]
    make_search(config, arguments[1:] if arguments[:1] == ["search"] else arguments)


def make_search(config: SearchRunConfig, arguments: Sequence[str]) -> Front | None:
    """As ``natsl.search.pipeline.run_search``; workers start while that is imported, which takes seconds."""
    from natsl.search.worker.spare import Spares

    with Spares.for_search(config) as spares:
        from natsl.search.pipeline import run_search

        return run_search(config, arguments, spares)


def run_training(config: TrainRunConfig, arguments: Sequence[str] | None = None) -> None:
    """Train a supernet, or specialise one, or resume that, in ``root/name/supernet``.

    arguments: the options as they were typed (None: those of the process).
    """
    device = resolve_device(config.device)
    if config.specialise is not None:
        _run_specialisation(config, device, sys.argv[1:] if arguments is None else arguments)
        return
    from natsl.data import TaskData, load_text
    from natsl.heldout import keep_record
    from natsl.model import count_parameters
    from natsl.train import TrainRecipe, fit

    check_batch(config.model.layers, config.train, config.supernet)
    check_chunks(config.model.chunk_size, config.data.seq_len)
    text = load_text(config.data.path, config.data.text_rules(str(user_path(config.root, "root"))))
    data = TaskData(config.data, text, config.model.vocab_size)
    run = Run.open(config.name, config.root)
    with run.lock():
        if run.study_db.exists():
            raise UserError(f"name = {config.name!r} is a search, which trains its own supernet: choose another name")
        check_resume(run, config)
        keep_record(run, data, config.root, None, allow_other=False)
        recipe = TrainRecipe(config.train, config.supernet, config.seed)
        with start_tracker(config.tracking, run, to_plain(config)) as tracker:
            net = fit(run, config.model, data, recipe, device, tracker)
        run.write_config(config)  # only now is it known that the checkpoints belong to this configuration
    print(f"supernet of {count_parameters(net):,} parameters in {run.supernet}")
    root = None if config.root == "runs" else config.root
    if Op.routed not in config.model.layers:  # there is one policy, which any budget comes to
        print(f"score it: {command('evaluate', {'run': config.name, 'budget': 1, 'root': root})}")
        return
    names = {"name": f"{config.name[:57]}-search", "supernet_from": config.name, "root": root}
    options = names | changed_options(config.data, DataConfig(), "data")
    print(f"search its policies: {command('search', options)}")


def _run_specialisation(config: TrainRunConfig, device: torch.device, arguments: Sequence[str]) -> None:
    """Specialise the weights of a run in ``root/name`` and print what that gained."""
    from natsl.heldout import keep_record
    from natsl.search.gain import lines
    from natsl.search.specialise import Settings, Source, claim, recipe_of, specialise

    source = Source.load(config.choice())
    given = Settings(config.model, config.data, config.supernet, config.train)
    settings = source.settings(given, _chosen(config, arguments))
    config = replace(config, model=settings.model, data=settings.data, supernet=settings.supernet, train=settings.train)
    data = source.data(config.data)
    recipe = recipe_of(source, settings, config.seed)
    run = Run.open(config.name, config.root)
    with run.lock():
        if run.study_db.exists():
            raise UserError(f"name = {config.name!r} is a search: choose another name")
        check_resume(run, config)
        claim(run, source)
        keep_record(run, data, config.root, None, allow_other=False)
        with start_tracker(config.tracking, run, to_plain(config)) as tracker:
            report = specialise(run, source, data, recipe, device, tracker)
        run.write_config(config)
    what = f"{report['pick'] or 'policy'} ({source.policy.describe()}) of run {config.specialise!r}"
    print(
        f"{what}, specialised in {recipe.train.steps} steps at a learning rate of {recipe.train.lr:.3g}: {run.supernet}"
    )
    print("\n".join(lines(report)))
    print(f"export it: {command('export', run_options(config.name, config.root))}")


def _chosen(config: TrainRunConfig, arguments: Sequence[str]) -> set[str]:
    """Options of the sections of a training that the user has set: they differ from the defaults, or were typed."""
    from natsl.cli.main import composed
    from natsl.cli.options import option_types

    typed = [argument.lstrip("+").partition("=")[0] for argument in arguments if "=" in argument]
    chosen = {
        name
        for name, _ in option_types(TrainRunConfig)
        if any(f"{name}.".startswith(f"{one}.") or one.startswith(f"{name}.") for one in typed)
    }
    defaults = (composed("train", TrainRunConfig), TrainRunConfig())
    for section in ("model", "data", "supernet", "train"):
        value = getattr(config, section)
        changed = [
            {name for name, *_ in differences(f"{section}.", to_plain(getattr(default, section)), value, type(value)())}
            for default in defaults
        ]
        chosen |= changed[0] & changed[1]
    return chosen


def export(config: ExportConfig) -> Path:
    """Export a point or a policy and return the folder."""
    from natsl.export import export_choice

    return export_choice(config.choice(), config.name, config.overwrite, config.dtype, config.sequences)


def run_export(config: ExportConfig) -> None:
    """Export a point or a policy, and say where it went."""
    from natsl.heldout import trained_on_tokens

    folder = export(config)
    print(f"exported to {folder}; a fresh process gave the supernet's logits")
    if config.sequences:
        what = f"up to {config.sequences} held-out sequences of each task, to score again; sequences=0 leaves them out"
        print(f"note: the folder holds {what}", file=sys.stderr)
    tokens = trained_on_tokens(Choice(export=str(folder)))
    options = {"export": str(folder)} if tokens else {"export": str(folder), "prompt": "def "}
    print(f"try it: {command('evaluate' if tokens else 'generate', options)}")


def run_verification(config: VerifyConfig) -> int:
    """Print what each check of a folder finds; 1 if one fails."""
    from natsl.hf import transformers_version
    from natsl.verify import checks

    failed = False
    for result in checks(user_path(config.export, "export")):
        failed |= result.fault is not None
        print(result.line(), flush=True)
    if transformers_version() is None:
        print("note: transformers is not installed, or too old: natsl's own loader only", file=sys.stderr)
    return int(failed)


def calibrate(config: CalibrateConfig) -> MadeTable:
    """Store a calibration table beside that of training."""
    run = Run.open(config.run, config.root, create=False)
    device = resolve_device(config.device)
    from natsl.calibrate import make_table

    return make_table(
        run,
        config.name,
        config.data,
        device,
        sequences=config.sequences,
        seed=config.seed,
        allow_other_data=config.allow_other_data,
        overwrite=config.overwrite,
    )


def run_calibration(config: CalibrateConfig) -> None:
    """Store a calibration table beside that of training, and print what budgets keep under it."""
    made = calibrate(config)
    from natsl.data import Split
    from natsl.evaluate import evaluate

    data, model = made.held.data, made.model
    print(f"{made.path}: calibrated on {data.corpus.description}")
    tasks = data.tasks if len(data.tasks) > 1 else []
    total = sum(data.config.tasks[task] for task in data.tasks)
    print("kept of the test part" + (", tasks by weight:" if tasks else ":"))
    print("budget   kept" + "".join(f"  {task:>8}" for task in tasks))
    sets = data.eval_sets(Split.test)  # calibrated on the part for the search
    for budget in CHECKED_BUDGETS:
        policy = RoutingPolicy.uniform(model.kinds, model.config.chunk_size, budget)
        kept = evaluate(model, policy, sets)
        by_task = kept.kept_fraction_by_task
        mean = sum(data.config.tasks[task] * by_task[task] for task in data.tasks) / total  # as the table was made
        print(f"{budget:6.2f} {mean:6.3f}" + "".join(f"  {by_task[task]:8.3f}" for task in tasks))
    if config.data.tasks:  # evaluate would score the tasks of the run
        return
    named = {} if config.data.path is None else {"data.path": data.config.path}  # where the table holds
    options = {**run_options(config.run, config.root), "calibration": config.name, "budget": 0.1, **named}
    print(f"try it: {command('evaluate', options)}")


def run_throughput(config: ThroughputConfig) -> None:
    """Print the table of what was timed and write ``throughput.json`` into the folder ``out``."""
    import torch

    from natsl.serving import measure_decode, measure_prefill
    from natsl.throughput import Phase, measure

    device = resolve_device(config.device)
    path = output_folder(config.out) / "throughput.json"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    size = f"{config.batch_size} × {config.tokens} tokens, {config.precision.value}"
    print(f"{name}, torch {torch.__version__}; {config.phase.value}, {size}")
    measures: dict[Phase, Callable[[ThroughputConfig, torch.device], Iterator[Speed | ServingSpeed]]]
    measures = {Phase.train: measure, Phase.prefill: measure_prefill, Phase.decode: measure_decode}
    rows: list[Speed | ServingSpeed] = []
    for row in measures[config.phase](config, device):
        if not rows:
            print(row.heading())
        rows.append(row)
        print(row.line(), flush=True)
    result = {
        "device": name,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "config": to_plain(config),
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"Written: {path}")
