"""Generation: the encoding of prompts, greedy and random draws against a direct loop, and bad arguments."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from natsl import checkpoint
from natsl.cli.generation import GenerateConfig
from natsl.cli.main import run_verb
from natsl.config import ModelConfig
from natsl.errors import UserError
from natsl.generate import Sampling, Transcript, decode, encode, generate, stream
from natsl.model import RoutedLM
from natsl.run import Run
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy

ROOT = Path(__file__).parents[1]
KINDS = [Op.routed, Op.delta]
POLICY = RoutingPolicy((LayerPolicy(threshold=0.0), LayerPolicy(Op.delta)), 8)


def make_model(vocab_size: int = 384) -> RoutedLM:
    torch.manual_seed(2)
    return RoutedLM(ModelConfig(KINDS, vocab_size, 16, 16, key_dim=8, value_dim=8, chunk_size=8)).eval()


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("ab", [97, 98]),
        ("é⟨k0⟩", [0xC3, 0xA9, 256]),
        ("⟨k63⟩⟨v0⟩⟨v63⟩", [319, 320, 383]),
        ("⟨300⟩x", [300, 120]),
        ("⟨k⟩", [*"⟨k⟩".encode()]),
        ("\n\t\0", [10, 9, 0]),
    ],
    ids=["letters", "key", "keys and values", "any id", "no id", "control"],
)
def test_prompts(text: str, tokens: list[int]) -> None:
    assert encode(text, 384) == tokens


@pytest.mark.parametrize(
    ("text", "size", "message"),
    [
        ("", 384, "prompt = '' is not allowed"),
        ("⟨k64⟩", 384, "it must be below ⟨k64⟩"),
        ("⟨v64⟩", 384, "it must be below ⟨v64⟩"),
        ("⟨384⟩", 384, "it must be below ⟨384⟩"),
        ("⟨k0⟩", 256, "the model's vocabulary has 256 tokens"),
        ("é", 128, "prompt = 195 is not allowed"),
    ],
    ids=["empty", "key", "value", "id", "model without keys", "model without bytes"],
)
def test_bad_prompts(text: str, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(text, size)


def test_decode_is_the_inverse() -> None:
    text = "def f(): return 'é€😀'\n⟨k12⟩⟨v3⟩ end"
    assert decode(encode(text, 384)) == text
    assert decode([31999]) == "⟨31999⟩"
    assert decode([0xC3, 256, 0xFF, 97]) == "\ufffd⟨k0⟩\ufffda"
    assert decode([0xC3]) == "\ufffd"
    assert decode([]) == ""


def test_a_character_appears_with_its_last_byte() -> None:
    assert list(stream(encode("aé", 384))) == ["a", "é"]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 30])
def test_greedy_is_the_likeliest_token_each_time(length: int) -> None:
    model = make_model()
    prompt = torch.randint(384, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    found = list(generate(model, POLICY, prompt, 12, Sampling(temperature=0)))
    text = torch.tensor([prompt + found])
    with torch.no_grad():
        expected = model(text, POLICY).logits[0, length - 1 : -1].argmax(-1)
    assert found == expected.tolist()
    assert found == list(generate(model, POLICY, prompt, 12, Sampling(temperature=0, seed=9)))
    assert len(prompt) == length


def test_draws_follow_the_seed_and_the_temperature() -> None:
    model = make_model()

    def draw(**options: float) -> list[int]:
        sampling = Sampling(options.get("temperature", 1.0), int(options.get("top_k", 0)), int(options.get("seed", 0)))
        return list(generate(model, POLICY, [1, 2, 3], 16, sampling))

    state = torch.random.get_rng_state()
    assert draw(seed=1) == draw(seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert draw(seed=1) != draw(seed=2)
    greedy = draw(temperature=0)
    assert draw(top_k=1, seed=5) == greedy
    assert draw(temperature=1e-6, seed=5) == greedy
    assert draw(top_k=384, seed=1) == draw(seed=1) == draw(top_k=9999, seed=1)


def test_frequencies_of_draws() -> None:
    model = make_model(vocab_size=4)
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2]]), POLICY).logits[0, -1].double()
    counts = torch.zeros(4, dtype=torch.float64)
    for seed in range(600):
        counts[next(generate(model, POLICY, [1, 2], 1, Sampling(0.5, 3, seed)))] += 1
    kept = logits.topk(3).indices
    expected = torch.zeros(4, dtype=torch.float64)
    expected[kept] = torch.softmax(logits[kept] / 0.5, -1)
    assert counts[logits.argmin()] == 0
    torch.testing.assert_close(counts / 600, expected, atol=0.07, rtol=0)


@pytest.mark.parametrize(("top_p", "kept"), [(0.05, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.9, 3), (1.0, 4)])
def test_the_nucleus_is_the_fewest_likeliest_tokens(top_p: float, kept: int) -> None:
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3], dtype=torch.float64).log()
    generator = torch.Generator().manual_seed(0)
    drawn = {Sampling(1.0, 0, 0, top_p).draw(logits, generator) for _ in range(300)}
    assert drawn == {*(1, 3, 0, 2)[:kept]}


def test_of_equal_tokens_the_nucleus_takes_the_first() -> None:
    generator = torch.Generator().manual_seed(0)
    for size, top_p, kept in ((2, 0.5, 1), (64, 0.25, 16)):
        drawn = {Sampling(1.0, 0, 0, top_p).draw(torch.zeros(size).double(), generator) for _ in range(600)}
        assert drawn == {*range(kept)}


def test_the_nucleus_is_of_the_temperature_and_of_top_k() -> None:
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3], dtype=torch.float64).log()
    generator = torch.Generator().manual_seed(0)
    hot = {Sampling(100.0, 0, 0, 0.7).draw(logits, generator) for _ in range(300)}
    assert hot == {0, 1, 3}, "all are nearly as likely, so that three make .7"
    two = {Sampling(100.0, 2, 0, 0.7).draw(logits, generator) for _ in range(300)}
    assert two == {1, 3}


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("abc", [], ["a", "b", "c"]),
        ("abc", ["x"], ["a", "b", "c"]),
        ("abc", ["b"], ["a", ""]),
        ("bc", ["b"], [""]),
        ("ababcd", ["abc"], ["", "", "ab", "", ""]),
        ("ababx", ["abc"], ["", "", "ab", "", "abx"]),
        ("aab", ["ab", "xx"], ["", "a", ""]),
        ("xa", ["ab"], ["x", "", "a"]),
        ("abcd", ["abcd", "bc"], ["", "", "a"]),
        ("a⟨k3⟩b", ["k3⟩", "⟨k"], ["a", ""]),
        ("é€", ["€"], ["", "é", "", "", ""]),
    ],
)
def test_text_ends_before_a_stop(text: str, stop: list[str], expected: list[str]) -> None:
    transcript, pieces = Transcript(stop), []
    for token in encode(text, 384):
        pieces.append(transcript.add(token))
        if transcript.ended:
            break
    assert pieces == expected[: len(pieces)]
    assert transcript.close() == "".join(expected[len(pieces) :])
    assert transcript.ended == any(part in text for part in stop)
    if transcript.ended:
        assert transcript.add(97) + transcript.close() == "", "what comes after a stop is left out"


def test_a_stop_may_have_line_breaks() -> None:
    assert GenerateConfig(run="r", stop=[r"\n\n", r"a\\n⟨k3⟩"]).stops() == ["\n\n", r"a\n⟨k3⟩"]


def test_a_cache_goes_on_where_it_ended() -> None:
    model = make_model()
    whole = list(generate(model, POLICY, [1, 2, 3], 12, Sampling(temperature=0)))
    cache = model.new_cache(1)
    layers = 2 * (3 * 48 * 4 + (2 * 2 * 8 * 8 + 2) * 4 + 8)  # convolution, delta rule
    router, pages = 16 * 4, 3 * 8 * (8 + 8) * 4 + 2 * 8 + 2 * 8  # three pages, table, kept
    assert cache.nbytes == 8 + layers + router + pages
    first = list(generate(model, POLICY, [1, 2, 3], 5, Sampling(temperature=0), cache))
    assert (cache.lengths.tolist(), cache.unread) == ([3 + 4], first[-1:])
    rest = list(generate(model, POLICY, [], 7, Sampling(temperature=0), cache))
    assert first + rest == whole
    found = cache.layers[0].pages
    assert found is not None
    more = (found.keys.shape[0] - 3) * 8 * (8 + 8) * 4 + (found.table.shape[2] - 1) * 2 * 8
    assert cache.nbytes == 8 + layers + router + pages + more


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "no prompt": (lambda: generate(make_model(), POLICY, [], 1, Sampling()), "at least one token"),
    "id too large": (lambda: generate(make_model(), POLICY, [384], 1, Sampling()), "ids must lie in 0–383"),
    "negative id": (lambda: generate(make_model(), POLICY, [-1], 1, Sampling()), "ids must lie in 0–383"),
    "no tokens": (lambda: generate(make_model(), POLICY, [1], 0, Sampling()), "max_new_tokens = 0"),
    "policy": (
        lambda: generate(make_model(), RoutingPolicy.all_softmax(KINDS, 16), [1], 1, Sampling()),
        "chunk size is 8",
    ),
    "temperature": (lambda: Sampling(temperature=-1), "temperature = -1"),
    "NaN": (lambda: Sampling(temperature=float("nan")), "temperature = nan"),
    "top_k": (lambda: Sampling(top_k=-1), "top_k = -1"),
    "seed": (lambda: Sampling(seed=-1), "seed = -1"),
    "top_p": (lambda: Sampling(top_p=0), "top_p = 0"),
    "too much": (lambda: Sampling(top_p=1.5), "top_p = 1.5"),
    "cache": (
        lambda: next(generate(make_model(), POLICY, [1], 1, Sampling(), make_model().new_cache(2))),
        "the cache holds 2 sequences, not 1",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_logits_that_are_not_finite() -> None:
    model = make_model()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="logits are not finite"):
        list(generate(model, POLICY, [1], 1, Sampling()))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In a process of its own, then, with other options, in this one."""
    run = Run.open("r", tmp_path / "runs")
    model = make_model()
    checkpoint.save(run.supernet, 1, model, torch.optim.AdamW(model.parameters()), {"finished": True}, 1)
    run.write_json(run.front_json, {"points": [{"id": "t1", "policy": POLICY.to_dict()}], "knee": "t1"})

    options = ["max_new_tokens=5", "device=cpu"]

    def call(*arguments: str) -> tuple[int, str, str]:
        code = 0
        try:
            run_verb("generate", [*options, *arguments])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return code, *capsys.readouterr()

    command = [sys.executable, "-m", "natsl.generate", *options, "run=r", "prompt='a⟨k3⟩'", "temperature=0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert re.fullmatch(r"note: 5 tokens, [\d.,]+ a second; a cache of [\d,]+ bytes for 6 tokens\n", done.stderr), (
        done.stderr
    )
    new = list(generate(model, POLICY, encode("a⟨k3⟩", 384), 5, Sampling(temperature=0)))
    assert done.stdout == "a⟨k3⟩" + decode(new) + "\n"
    monkeypatch.chdir(tmp_path)
    code, out, err = call("run=r", "prompt='a⟨k3⟩'", "temperature=0", f"stop=['{decode(new[2:3])}']")
    assert code == 0
    assert out == "a⟨k3⟩" + decode(new).partition(decode(new[2:3]))[0] + "\n"
    read = 2 + decode(new).index(decode(new[2:3])) // len(decode(new[:1]))
    drawn = f"{read - 1} token{'s' * (read != 2)}"
    assert re.fullmatch(rf"note: {drawn}(, .* a second)?; a cache of .* bytes for {read} tokens\n", err)
    goes_on = ("run=r", "state=s.state", "temperature=0")
    _, first, _ = call(*goes_on, "prompt=a⟨k3⟩", "max_new_tokens=2")
    _, second, _ = call(*goes_on, "max_new_tokens=3")
    assert first + second == "a⟨k3⟩" + decode(new[:2]) + "\n" + decode(new[2:]) + "\n"
    _, _, err = call("run=r", "stop=['']")
    assert err == "error: stop = [''] is not allowed: each must have at least one character\n"
    code, _, err = call("run=r", "export=x")
    assert code == 2
    assert err == "error: run, export = ('r', 'x') is not allowed: give either run=<name> or export=<folder>\n"


@pytest.mark.parametrize("prompt", ["def main(", "日本"], ids=["bracket", "not ASCII"])
def test_a_prompt_with_symbols_needs_no_quotes(
    prompt: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["natsl-generate", "run=x", f"prompt={prompt}"])
    with pytest.raises(SystemExit) as exit_info:
        run_verb("generate")
    assert exit_info.value.code == 2
    assert "error: there is no run 'x' in runs; known: none\n" in capsys.readouterr().err
