"""Exports scored by lm-eval: tasks from a local file, of all three kinds of requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from natsl.generate import Sampling, generate
from natsl.load import load_exported
from tests.run_helpers import make_export

pytest.importorskip("lm_eval", minversion="0.4.13")
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

DOCUMENTS: list[dict[str, Any]] = [  # of different lengths, one beyond ASCII
    {"text": "abc def gh ab", "question": "abc d", "choices": ["ef gh", "fgh "], "answer": 0},
    {"text": "häh? " * 9, "question": "häh? " * 7 + "h", "choices": ["äh", "a b c d e f g h"], "answer": 1},
    {"text": "a", "question": "a", "choices": [" ", "b"], "answer": 1},
]
TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "continued": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["zz"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_are_those_of_natsl(
    batch_size: int, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}" + TASK.format(file=file) + task)
    tokenizer = AutoTokenizer.from_pretrained(exported, eos_token="⟨end⟩")
    folder = str(exported)
    lm = HFLM(folder, "causal", tokenizer=tokenizer, device="cpu", batch_size=batch_size, prefix_token_id=10)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = lm_eval.simple_evaluate(model=lm, tasks=list(TASKS), task_manager=manager, log_samples=True)
    samples = {name: sorted(results["samples"][name], key=lambda sample: sample["doc_id"]) for name in TASKS}
    model, policy = load_exported(exported)

    def score(text: bytes, more: bytes) -> float:
        """Nats of ``more`` after ``text``."""
        tokens = torch.tensor([[*text, *more]])
        logits = model(tokens[:, :-1], policy).logits[0, len(text) - 1 :].detach()
        return float(logits.log_softmax(-1).gather(1, tokens[0, len(text) :, None]).sum())

    for i, document in enumerate(DOCUMENTS):
        question = document["question"].encode()
        for answer, found in zip(document["choices"], samples["choice"][i]["resps"], strict=True):
            assert found[0][0] == pytest.approx(score(question, answer.encode()), abs=1e-4)
        (found,) = samples["rolling"][i]["resps"][0]
        assert found == pytest.approx(score(b"\n", document["text"].encode()), abs=1e-3)
        (found,) = samples["continued"][i]["resps"][0]
        assert found == tokenizer.decode(list(generate(model, policy, question, 12, Sampling(0))))
    lm.custom_prefix_token_id = None  # the tokenizer's end is then what comes before a text: no token of the model
    with pytest.raises(ValueError, match="must lie in"):
        lm_eval.simple_evaluate(model=lm, tasks=["rolling"], task_manager=manager)
