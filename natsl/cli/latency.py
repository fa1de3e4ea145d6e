"""``natsl latency``: the table of times that the objectives ``decode_ms`` and ``prefill_ms`` are read from."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field

from natsl.config import ModelConfig, Precision
from natsl.device import resolve_device
from natsl.files import output_folder, to_plain, write_json
from natsl.space.check import check_choice, check_counts


@dataclass
class LatencyConfig:
    """Time the layers of a model on this device, and check the table against whole models.

    ``tokens``: the longest text, ``batch_size`` sequences at once; a search with ``search.context`` up to ``tokens``,
    ``search.cost_batch_size`` of ``batch_size``, the same model and precision then finds the table in the user's cache
    folder. One that is there is taken unless ``fresh``; then ``tokens`` must not be less than it goes up to. Whole
    models under ``policies`` random policies are timed at ``tokens`` and at about a third of them, beside what the
    table says. Results go to ``out``/latency.json. ``device`` as for training.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    tokens: int = 384
    batch_size: int = 1
    precision: Precision = Precision.float32
    fresh: bool = False
    policies: int = 6
    seed: int = 0
    device: str = "auto"
    out: str = "runs/latency"

    def __post_init__(self) -> None:
        self.precision = check_choice("precision", self.precision, Precision)
        check_counts(1, {name: getattr(self, name) for name in ("tokens", "batch_size")})
        check_counts(0, {name: getattr(self, name) for name in ("policies", "seed")})


def run_latency(config: LatencyConfig) -> None:
    """Print the table of a model and its errors, and write both into the folder ``out``."""
    device = resolve_device(config.device)
    from natsl.latency import Setting, check_table, obtain_table, table_path

    setting = Setting(config.model, config.precision, device, config.batch_size)
    path = output_folder(config.out) / "latency.json"
    table = obtain_table(setting, [config.tokens], fresh=config.fresh)
    made = setting.to_dict()
    print(f"{made['device']}, torch {made['torch']}; batch size {config.batch_size}, {config.precision.value}")
    print(f"{'ms of a layer, kept':<22} " + " ".join(f"{fraction:>9g}" for fraction in table.fractions))
    for kind, grids in table.layers.items():
        for step, grid in grids.items():
            for tokens, times in zip(table.lengths, grid, strict=True):
                print(f"{kind.value + ' ' + step.value:<14} {tokens:>7} " + " ".join(f"{ms:>9.4f}" for ms in times))
    for step, rest in table.rest.items():
        for tokens, ms in zip(table.lengths, rest, strict=True):
            print(f"{'rest ' + step.value:<14} {tokens:>7} {ms:>9.4f}")
    rows = []
    if config.policies:
        print(f"{'whole models, kept':<40} {'tokens':>14} {'table ms':>9} {'timed ms':>9} {'error':>7}", flush=True)
    lengths = sorted({config.tokens, max(table.lengths[0], config.tokens // 3)})
    for row in check_table(table, setting, lengths, config.policies, config.seed):
        rows.append(asdict(row) | {"error": row.error})
        policy = row.policy if len(row.policy) <= 40 else row.policy[:37] + "..."
        print(
            f"{policy:<40} {row.step.value + ' ' + str(row.tokens):>14} {row.predicted_ms:>9.3f} "
            f"{row.measured_ms:>9.3f} {100 * row.error:>+6.1f}%",
            flush=True,
        )
    if rows:
        errors = sorted(abs(row["error"]) for row in rows)
        print(f"error: median {100 * errors[len(errors) // 2]:.1f}%, largest {100 * errors[-1]:.1f}%")
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    write_json(path, {"date": date, "config": to_plain(config), "table": table.to_dict(), "checks": rows})
    print(f"Written: {path}\nStored: {table_path(setting)}")
