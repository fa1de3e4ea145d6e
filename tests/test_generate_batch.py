"""Generation of several prompts at once, under policies that change, and in several calls."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from natsl import checkpoint
from natsl.cache import Cache
from natsl.cli.generation import GenerateConfig, run_generation
from natsl.errors import UserError
from natsl.generate import Sampling, decode, encode, generate, generate_batch, read_prompts
from natsl.model import RoutedLM
from natsl.run import Run
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from tests.oracles import fill_calibration, tiny_model

C = 8
GREEDY, DRAWN = Sampling(temperature=0), Sampling(temperature=1.0, top_k=50, seed=3, top_p=0.95)
LENGTHS = (1, C + 3, 3 * C, 2 * C - 1)


def make_model(kinds: str = "rsdr") -> RoutedLM:
    """In float64, so that the rounding of another batch size decides no draw."""
    model = tiny_model(kinds, rope=True)
    fill_calibration(model)
    return model.double().eval()


def uniform(model: RoutedLM, budget: float) -> RoutingPolicy:
    return RoutingPolicy.uniform(model.kinds, C, budget)


def make_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(384, (n,), generator=generator).tolist() for n in LENGTHS]


def rows_of(steps: Sequence[list[int | None]]) -> list[list[int]]:
    """Tokens of each row; after the first None of a row there are only more of them."""
    rows = [[token for token in row if token is not None] for row in zip(*steps, strict=True)]
    for row, tokens in enumerate(rows):
        assert [step[row] for step in steps[: len(tokens)]] == tokens
    return rows


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_row_gets_what_its_prompt_gets_alone(sampling: Sampling) -> None:
    model, prompts = make_model(), make_prompts()
    policy = uniform(model, 0.5)
    rows = rows_of(list(generate_batch(model, policy, prompts, 2 * C + 3, sampling)))
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        seeded = Sampling(sampling.temperature, sampling.top_k, sampling.seed + i, sampling.top_p)
        assert row == list(generate(model, policy, prompt, 2 * C + 3, seeded)), i
    if sampling is DRAWN:
        again = rows_of(list(generate_batch(model, policy, prompts[:1] * 2, 2 * C, sampling)))
        assert again[0] == rows[0][: 2 * C]
        assert again[1] != again[0], "rows of one prompt draw apart"


def test_draws_of_tokens_and_rows_are_independent() -> None:
    """All tokens are as likely: so are all pairs of tokens in a row, and of tokens of two rows."""
    model = tiny_model("d", vocab_size=4)
    with torch.no_grad():
        model.embed.weight.zero_()
    steps = generate_batch(model, uniform(model, 0.0), [[0], [0]], 1001, Sampling(temperature=1.0))
    first, second = (torch.tensor(row) for row in rows_of(list(steps)))
    for a, b in ((first[1:], first[:-1]), (second[1:], second[:-1]), (first, second), (first[1:], second[:-1])):
        share = torch.bincount(4 * a + b, minlength=16) / len(a)
        torch.testing.assert_close(share, torch.full((16,), 1 / 16), rtol=0, atol=0.03)


def test_every_row_has_its_own_policy() -> None:
    model, prompts = make_model(), make_prompts()
    policies = [
        uniform(model, 0.0),
        uniform(model, 1.0),
        RoutingPolicy.fill(model.kinds, C, LayerPolicy(budget=0.7, cap=0.4, burst=1)),
        uniform(model, 0.3),
    ]
    rows = rows_of(list(generate_batch(model, policies, prompts, 3 * C, GREEDY)))
    for prompt, policy, row in zip(prompts, policies, rows, strict=True):
        assert row == list(generate(model, policy, prompt, 3 * C, GREEDY))


def test_a_row_that_has_ended_stands_still_and_the_others_go_on() -> None:
    model, prompts = make_model(), make_prompts()
    policy, limits = uniform(model, 0.5), [5, 1, 2 * C, C + 2]
    counts, cache = [0] * 4, model.new_cache(4)

    def ends(row: int, token: int) -> bool:
        counts[row] += 1
        return counts[row] == limits[row]

    steps = list(generate_batch(model, policy, prompts, 100, GREEDY, cache, ends))
    assert len(steps) == max(limits), "nothing is drawn once all have ended"
    rows = rows_of(steps)
    assert [len(row) for row in rows] == limits
    assert cache.lengths.tolist() == [n + limit - 1 for n, limit in zip(LENGTHS, limits, strict=True)]
    assert cache.unread == [row[-1] for row in rows]
    more = rows_of(list(generate_batch(model, policy, [[]] * 4, C, GREEDY, cache)))
    for prompt, row, rest in zip(prompts, rows, more, strict=True):
        assert row + rest == list(generate(model, policy, prompt, len(row) + C, GREEDY)), "its state is its own"


@pytest.mark.parametrize("cut", [1, 4, 5, 12])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_calls_in_a_row_draw_what_one_call_draws(sampling: Sampling, cut: int) -> None:
    model, prompts = make_model(), make_prompts()[:2]
    policy = uniform(model, 0.5)
    whole = list(generate_batch(model, policy, prompts, 20, sampling))
    cache = model.new_cache(2)
    first = list(generate_batch(model, policy, prompts, cut, sampling, cache))
    assert first + list(generate_batch(model, policy, [[], []], 20 - cut, sampling, cache)) == whole


def test_a_new_prompt_follows_what_was_drawn() -> None:
    model, policy = make_model(), uniform(make_model(), 0.5)
    cache = model.new_cache(1)
    first = list(generate(model, policy, [1, 2], 4, GREEDY, cache))
    second = list(generate(model, policy, [3, 4], 4, GREEDY, cache))
    assert second == list(generate(model, policy, [1, 2, *first, 3, 4], 4, GREEDY))


def test_what_forward_has_read_is_not_read_again() -> None:
    model, policy = make_model(), uniform(make_model(), 0.5)
    cache = model.new_cache(1)
    first = list(generate(model, policy, [1, 2], 4, GREEDY, cache))
    model(torch.tensor([[first[-1], 9]]), policy, cache=cache)
    assert cache.unread == [None]
    with pytest.raises(ValueError, match="prompt = \\[\\] is not allowed: it must have at least one token"):
        generate(model, policy, [], 4, GREEDY, cache)
    assert list(generate(model, policy, [7], 4, GREEDY, cache)) == list(
        generate(model, policy, [1, 2, *first, 9, 7], 4, GREEDY)
    )


def test_a_new_budget_decides_the_chunks_that_are_completed_later() -> None:
    """Tokens of a run whose budget changes inside a chunk, against one pass with the routes that were decided."""
    model, prompt = make_model("rr"), make_prompts()[1]
    kept: list[list[list[int]]] = []
    cache, drawn = model.new_cache(1), list(prompt)
    budgets = [(1.0, C), (0.0, 2 * C + 1), (1.0, C)]
    for budget, count in budgets:
        new = [] if kept else prompt
        drawn += generate(model, uniform(model, budget), new, count, GREEDY, cache)
        pages = cache.layers[0].pages
        assert pages is not None
        kept.append(pages.kept.tolist())
    # chunks are complete once their last token is read; a token that was drawn is read under the next policy
    complete = [(len(prompt) + sum(count for _, count in budgets[: i + 1]) - 1) // C for i in range(3)]
    route = torch.zeros(1, -(-len(drawn) // C), 2, dtype=torch.float64)
    route[:, : complete[0]] = route[:, complete[1] : complete[2]] = 1
    assert kept == [[[complete[0]] * 2]] * 2 + [[[complete[0] + complete[2] - complete[1]] * 2]]
    with torch.no_grad():
        logits = model(torch.tensor([drawn]), uniform(model, 0.5), routes=[route, route]).logits[0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == drawn[len(prompt) :]


@pytest.mark.parametrize(
    ("prompts", "rows", "message"),
    [
        ([], None, "prompts = \\[\\] is not allowed"),
        ([[1], []], None, "prompt = \\[\\] is not allowed: it must have at least one token"),
        ([[1], [384]], None, "ids must lie in 0–383"),
        ([[1], [2]], 3, "the cache holds 3 sequences, not 2"),
        ([[1]] * 3, None, "a batch of 3 does not split into 2 equal policies"),
    ],
    ids=["none", "empty", "id", "cache", "policies"],
)
def test_prompts_that_cannot_be_continued(prompts: list[list[int]], rows: int | None, message: str) -> None:
    model = make_model()
    policies = [uniform(model, 0.2), uniform(model, 0.4)]
    with pytest.raises(ValueError, match=message):
        generate_batch(model, policies, prompts, 1, GREEDY, None if rows is None else model.new_cache(rows))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return store(tmp_path, make_model("rd").float())


def store(folder: Path, model: RoutedLM, name: str = "r") -> Run:
    run = Run.open(name, folder / "runs")
    checkpoint.save(run.supernet, 1, model, torch.optim.AdamW(model.parameters()), {"finished": True}, 1)
    return run


def config(run: Run, **options: object) -> GenerateConfig:
    return GenerateConfig(run=run.name, root=str(run.path.parent), device="cpu", **options)  # type: ignore[arg-type]


def test_the_command_prints_prompts_in_order(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [r"a\nb", r"c\\n⟨k3⟩ ", "é"]
    (tmp_path / "lines.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    model, _ = checkpoint.load_model(run.supernet)
    texts = ["a\nb", r"c\n⟨k3⟩ ", "é"]
    expected = []
    for i, text in enumerate(texts):
        new = decode(list(generate(model, uniform(model, 0.5), encode(text, 384), 12, Sampling(1.0, seed=i))))
        expected.append(new)
    stop = next(x for x in expected[1] if x not in expected[0] and x.isprintable())  # the second ends before the first
    done = {"budget": 0.5, "prompts_file": str(tmp_path / "lines.txt"), "max_new_tokens": 12, "temperature": 1.0}
    run_generation(config(run, **done, stop=[stop]))
    output = capsys.readouterr()
    assert output.out == "".join(
        f"==> prompt {i + 1} of 3 <==\n{text}{new.partition(stop)[0]}\n"
        for i, (text, new) in enumerate(zip(texts, expected, strict=True))
    )
    assert re.fullmatch(
        r"note: \d+ tokens of 3 prompts(, [\d.,]+ a second)?; a cache of [\d,]+ bytes for \d+ tokens\n", output.err
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a\nb\n", ["a", "b"]),
        (b"a\r\nb", ["a", "b"]),
        (b"x\x0cy\xe2\x80\xa8z\n", ["x\x0cy\u2028z"]),
        (b"\xff\n", ["\udcff"]),
        (b"a\n\nb\n", "line 2 is empty"),
        (b"\n", "line 1 is empty"),
        (b"", "prompts_file = .* is empty"),
    ],
)
def test_prompts_of_a_file(content: bytes, expected: list[str] | str, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_bytes(content)
    if isinstance(expected, list):
        assert read_prompts(str(tmp_path / "lines.txt")) == expected
        return
    with pytest.raises(UserError, match=expected):
        read_prompts(str(tmp_path / "lines.txt"))


def test_a_token_outside_the_vocabulary_has_the_number_of_its_line(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("a\n" * 6 + "b⟨99999⟩\n")
    with pytest.raises(UserError, match=r"lines\.txt': line 7: prompt = '⟨99999⟩' is not allowed: it must be"):
        run_generation(config(run, budget=0.3, prompts_file=str(path)))
    with pytest.raises(ValueError, match=r"^prompt = '⟨99999⟩' is not allowed"):
        run_generation(config(run, budget=0.3, prompt="b⟨99999⟩"))


def test_a_budget_on_the_command_line(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = checkpoint.load_model(run.supernet)
    prompt = "one chunk and some more"
    printed = []
    for budget in (0.0, 0.3, 1.0):
        run_generation(config(run, budget=budget, prompt=prompt, temperature=0.0, max_new_tokens=9))
        printed.append(capsys.readouterr().out)
        assert (
            printed[-1]
            == prompt + decode(list(generate(model, uniform(model, budget), encode(prompt, 384), 9, GREEDY))) + "\n"
        )
    with pytest.raises(ValueError, match=r"policy, budget = \('p', 0.5\) is not allowed: give only one of them"):
        config(run, budget=0.5, policy="p")
    with pytest.raises(ValueError, match=r"budget = 1.5 is not allowed: it must lie in \[0, 1\]"):
        config(run, budget=1.5)
    plain = store(tmp_path, tiny_model("rd"), "plain")
    with pytest.raises(UserError, match="the model is not calibrated: budgets need a calibration table"):
        run_generation(config(plain, budget=0.5))
    fixed = store(tmp_path, tiny_model("sd"), "fixed")
    with pytest.raises(UserError, match=r"budget = 1\.0 has no effect: no layer of the model is routed"):
        run_generation(config(fixed, budget=1.0))
    assert capsys.readouterr().out == ""


def test_a_state_goes_on_as_if_nothing_had_ended(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = checkpoint.load_model(run.supernet)
    file, prompt, drawn = tmp_path / "s.state", "def ", {"budget": 0.5, "temperature": 1.0, "seed": 4}
    whole = list(generate(model, uniform(model, 0.5), encode(prompt, 384), 30, Sampling(1.0, seed=4)))
    tokens = []
    for count in (11, 1, 18):
        run_generation(config(run, state=str(file), max_new_tokens=count, **drawn))
        tokens.append(capsys.readouterr().out.removesuffix("\n"))
        assert Cache.load(file, model).unread == [whole[sum((11, 1, 18)[: len(tokens)]) - 1]]
    pieces = [whole[:11], whole[11:12], whole[12:]]
    assert tokens == [prompt + decode(pieces[0]), decode(pieces[1]), decode(pieces[2])]
    run_generation(config(run, state=str(file), max_new_tokens=5, prompt="more", **{**drawn, "budget": 1.0}))
    cache = model.new_cache(1)
    list(generate(model, uniform(model, 0.5), encode(prompt, 384), 30, Sampling(1.0, seed=4), cache))
    more = list(generate(model, uniform(model, 1.0), encode("more", 384), 5, Sampling(1.0, seed=4), cache))
    assert capsys.readouterr().out == f"more{decode(more)}\n"


def test_a_state_of_several_prompts(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lines.txt").write_text("first\nsecond one\n")
    model, _ = checkpoint.load_model(run.supernet)
    file = str(tmp_path / "s.state")
    prompts = [encode(text, 384) for text in ("first", "second one")]
    whole = rows_of(list(generate_batch(model, uniform(model, 0.5), prompts, 12, GREEDY)))
    options = {"budget": 0.5, "temperature": 0.0, "state": file}
    run_generation(config(run, prompts_file=str(tmp_path / "lines.txt"), max_new_tokens=5, **options))
    capsys.readouterr()
    run_generation(config(run, max_new_tokens=7, **options))
    assert capsys.readouterr().out == "".join(
        f"==> prompt {i + 1} of 2 <==\n{decode(row[5:])}\n" for i, row in enumerate(whole)
    )
    with pytest.raises(UserError, match="holds 2 sequences, but 1 are to be continued"):
        run_generation(config(run, prompt="x", **options))


def test_a_run_that_fails_leaves_the_state_as_it_was(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "s.state"
    options = {"budget": 0.5, "state": str(file), "max_new_tokens": 4}
    with pytest.raises(UserError, match=r"state: .*none/s.state cannot be written: No such file or directory"):
        run_generation(config(run, **{**options, "state": str(tmp_path / "none" / "s.state")}))
    assert capsys.readouterr().out == "", "found before anything is drawn"
    run_generation(config(run, **options))
    before = file.read_bytes()

    class Interrupted(BaseException):
        pass

    draw, draws = Sampling.draw, [0]

    def interrupted(self: Sampling, logits: torch.Tensor, generator: torch.Generator) -> int:
        draws[0] += 1
        if draws[0] == 3:
            raise Interrupted
        return draw(self, logits, generator)

    monkeypatch.setattr(Sampling, "draw", interrupted)
    with pytest.raises(Interrupted):
        run_generation(config(run, **options))
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["s.state"]


def test_a_policy_has_to_fit_the_model() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="chunk size is 8"):
        generate_batch(model, RoutingPolicy.all_softmax([Op.routed] * 4, 16), [[1]], 1, GREEDY)
