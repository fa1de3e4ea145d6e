"""The README of an exported folder: what it is, what its policy does, how well it did, how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from natsl.files import read_json
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy

if TYPE_CHECKING:
    from natsl.verify import Result

_BAR = 20  # characters for all chunks


def card(folder: Path, results: Sequence[Result]) -> str:
    """The text for the files in a folder; ``results``: of the checks (none: they were not made)."""
    config, made_from = (read_json(folder / name) for name in ("config.json", "provenance.json"))
    sample = read_json(folder / "verification.json")
    own, dtype = config["natsl"], config["dtype"]
    policy = RoutingPolicy.from_dict(own["policy"])
    shape = own["model"]
    kept = [(scores or {}).get("kept_by_head") for scores in (made_from.get("measured"), sample["scores"])]
    kinds = ", ".join(
        f"{own['supernet_layers'].count(op.value)} {op.value}" for op in Op if op.value in own["supernet_layers"]
    )
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    head += ["tags: [natsl, linear-attention, hybrid-attention]", "---"]
    parts = [
        *head,
        f"# {made_from.get('run', 'natsl')} {made_from.get('id', policy.digest())}",
        "",
        f"A language model whose layers hold two memories, softmax attention and Gated DeltaNet, made by natsl "
        f"([method](https://arxiv.org/abs/2602.03681)): {len(policy.layers)} layers (in the supernet {kinds}), width "
        f"{shape['width']}, {shape['heads']} routing heads, a vocabulary of {shape['vocab_size']}, chunks of "
        f"{shape['chunk_size']} tokens. The weights are {dtype}; those that routes depend on are float32.",
        *_specialised(made_from, policy),
        "",
        "## Load it",
        *_loading((folder / "tokenizer.json").is_file()),
        "",
        "## Policy",
        "Which share of the chunks softmax attention keeps in each layer and head; the delta rule takes the others.",
        "D: delta rule only, S: every chunk, .25: a budget, θ: a threshold, ≤: a cap.",
        "",
        "```",
        *_drawing(policy.layers, kept[0] or kept[1]),
        "```",
        "",
        "## Scores",
        *_scores(made_from, sample),
        "",
        "## Provenance",
        *_provenance(made_from, own),
        "",
        "## Checks",
        *_checks(results),
        "",
    ]
    return "\n".join(parts)


def _specialised(made_from: Mapping[str, Any], policy: RoutingPolicy) -> list[str]:
    """What the weights were trained on for, after they were those of a supernet."""
    special = made_from.get("specialised")
    if not special:
        return []
    own = special.get("digest") == policy.digest()
    which = "the policy below" if own else f"another policy than the one below ({special.get('digest')})"
    return ["", f"**Specialised**: {_source(special)}, trained on for {which} alone."]


def _source(special: Mapping[str, Any]) -> str:
    """The weights that a specialisation began with, and how its policy was named."""
    pick = special.get("pick") or special.get("policy_file")
    return f"the weights of run {special.get('run')}" + (f", {pick}" if pick else "")


def _loading(tokenizer: bool) -> list[str]:
    lines = [
        "```python",
        "import natsl  # makes transformers know the model",
        "from transformers import AutoModelForCausalLM",
    ]
    if tokenizer:
        lines[-1] += ", AutoTokenizer"
        lines += [
            "",
            'model = AutoModelForCausalLM.from_pretrained("<this folder>")',
            'tokenizer = AutoTokenizer.from_pretrained("<this folder>")',
            'inputs = tokenizer(["def ", "import os\\n"], padding=True, return_tensors="pt")',
            "print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=64), skip_special_tokens=True))",
        ]
    else:
        lines += ["", 'model = AutoModelForCausalLM.from_pretrained("<this folder>")']
    own = "Without transformers: `natsl.load.load_exported`, `natsl generate export=<this folder>`."
    if not tokenizer:
        own = "It was trained on ids of a tokenizer that natsl does not have. Without transformers: "
        own += "`natsl.load.load_exported`."
    return [*lines, "```", own + " `natsl verify export=<this folder>` repeats the checks below."]


def _drawing(layers: Sequence[LayerPolicy], kept: Sequence[Sequence[float]] | None) -> list[str]:
    """A line for each layer, or for each of its heads where it is known what they keep."""
    lines = []
    for i, layer in enumerate(layers):
        name = f"layer {i:>2}  {layer.describe():<10}"
        if layer.op is not Op.routed or kept is None:
            share = {Op.delta: 0.0, Op.softmax: 1.0}.get(layer.op)
            lines.append(f"{name}  all heads {_bar(share)}".rstrip())
            continue
        for head, share in enumerate(kept[i]):
            lines.append(f"{name if head == 0 else ' ' * len(name)}  head {head:<4} {_bar(share)}")
    return lines


def _bar(share: float | None) -> str:
    if share is None:
        return ""
    full = round(share * _BAR)
    return "█" * full + "·" * (_BAR - full) + f" {100 * share:5.1f} %"


def _scores(made_from: Mapping[str, Any], sample: Mapping[str, Any]) -> list[str]:
    whole, own = made_from.get("measured") or {}, sample["scores"] or {}
    names = [name for name in {**whole, **own} if any(isinstance(x.get(name), float) for x in (whole, own))]
    note = "The folder holds no sequences: the text of the run was not there, or none were wanted."
    if not names:
        return [note]

    def shown(values: Mapping[str, Any], name: str) -> str:
        value = values.get(name)
        return f"{value:.4g}" if isinstance(value, float) else "–"

    rows = [f"| {name} | {shown(whole, name)} | {shown(own, name)} |" for name in names]
    return [
        "| | test part, in the search | sequences in this folder |",
        "| --- | --- | --- |",
        *rows,
        "",
        "Losses in nats per token, errors as shares of the answers.",
        "The sequences are the first few of each task's test part." if own else note,
    ]


def _provenance(made_from: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    checkpoint = made_from.get("checkpoint") or {}
    facts = {
        "run": made_from.get("run"),
        "point": made_from.get("id"),
        "specialised from": None if not made_from.get("specialised") else _source(made_from["specialised"]),
        "policy": made_from.get("policy_file") or RoutingPolicy.from_dict(own["policy"]).digest(),
        "calibration": (made_from.get("calibration") or {}).get("name"),
        "step of training": checkpoint.get("step"),
        "sha256 of the supernet": checkpoint.get("sha256"),
        "natsl": own["version"],
    }
    return [f"- {name}: {value}" for name, value in facts.items() if value is not None] + [
        "- the rest: `provenance.json`"
    ]


def _checks(results: Sequence[Result]) -> list[str]:
    if not results:
        return ["None were made."]
    loaders = list(dict.fromkeys(result.loader for result in results))
    note = [] if len(loaders) > 1 else ["", "transformers was not installed: only natsl's own loader was checked."]
    made = f"When it was exported, in a process of its own, with {' and '.join(loaders)}:"
    return [made, "", *[f"- {item.loader}: {item.check}: {item.detail}" for item in results], *note]
