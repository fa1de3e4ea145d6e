"""Generation whose single tokens go through ``Decoder``, as on a GPU: natsl's own and that of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from natsl.decode import Decoder, step_limit
from natsl.files import to_plain
from natsl.generate import Sampling, generate_batch
from natsl.model import RoutedLM
from natsl.space.policy import LayerPolicy, RoutingPolicy
from tests.oracles import mixer_of
from tests.test_decode import CAPPED, DEVICE, HEADS, C, D, S, model_of

POLICIES = [RoutingPolicy((HEADS, S, D), C), RoutingPolicy((CAPPED, S, D), C)]
PROMPTS = [list(range(40, 40 + n)) for n in (14, 30)]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every step of a decoder from now on."""
    made: list[int] = []
    step = Decoder.step

    def counted(self: Decoder, tokens: Tensor, live: Tensor | None = None) -> Tensor:
        made.append(len(tokens))
        return step(self, tokens, live)

    monkeypatch.setattr(Decoder, "step", counted)
    return made


def make_model() -> RoutedLM:
    """One whose layers matter: a new model just repeats the last token."""
    model = model_of("rsd")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("out_proj.weight"):
                weight.mul_(20)
    return model


def drawn(monkeypatch: pytest.MonkeyPatch, stepped: bool, **options: Any) -> list[list[int | None]]:
    monkeypatch.setattr("natsl.decode.steps_on", lambda device: stepped)
    return list(generate_batch(make_model(), POLICIES, PROMPTS, 8, Sampling(temperature=0), **options))


def test_generation_by_steps(steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows under two policies, one of which ends early."""
    expected = drawn(monkeypatch, False)
    first: int | None = expected[2][0]
    assert len({token for tokens in expected for token in tokens}) > 4

    def ends(row: int, token: int) -> bool:
        return row == 0 and token == first

    with_end = drawn(monkeypatch, False, ends=ends)
    assert steps == []
    assert drawn(monkeypatch, True) == expected
    assert steps == [2] * 7
    steps.clear()
    assert drawn(monkeypatch, True, ends=ends) == with_end
    assert steps
    assert with_end[-1][0] is None


def test_a_cache_is_read_on_with_another_policy(steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = make_model(), RoutingPolicy((LayerPolicy(threshold=9e9), S, D), C)
    results = []
    for stepped in (False, True):
        monkeypatch.setattr("natsl.decode.steps_on", lambda device, stepped=stepped: stepped)
        cache, tokens = model.new_cache(2), []
        for policy, prompts in ((POLICIES[0], PROMPTS), (other, [[1], [2]])):
            tokens += list(generate_batch(model, policy, prompts, 6, Sampling(temperature=0), cache))
        results.append((tokens, cache.lengths.tolist()))
    assert results[0] == results[1]


def hf_model() -> Any:
    pytest.importorskip("transformers")
    from natsl.hf.config import NatslConfig
    from natsl.hf.model import NatslForCausalLM

    model = make_model()
    own = {
        "model": to_plain(model.config),
        "policy": POLICIES[0].to_dict(),
        "calibration_points": model.calibration.points,
    }
    lm: Any = NatslForCausalLM(NatslConfig(natsl=own))
    lm.model.load_state_dict(model.state_dict())
    return lm.to(DEVICE).eval()


def texts(lm: Any, stepped: bool, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Sequence[Sequence[int]]:
    monkeypatch.setattr("natsl.hf.model.steps_on", lambda device: stepped)
    ids = torch.tensor([[lm.config.vocab_size] * 16 + PROMPTS[0], PROMPTS[1]], device=DEVICE)
    mask = ids != lm.config.vocab_size
    tokens = lm.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, **options)
    rows: list[list[int]] = tokens[:, 30:].tolist()
    return rows


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"policy": POLICIES[1]}], ids=["greedy", "beams", "policy"])
def test_transformers_by_steps(options: dict[str, Any], steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    lm = hf_model()
    expected = texts(lm, False, monkeypatch, **options)
    assert steps == []
    assert texts(lm, True, monkeypatch, **options) == expected
    assert steps == [2 * options.get("num_beams", 1)] * 5


def test_changed_weights_are_seen(steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    lm = hf_model()
    before = texts(lm, True, monkeypatch)
    with torch.no_grad():
        lm.model.norm.weight.neg_()
    expected = texts(lm, False, monkeypatch)
    assert texts(lm, True, monkeypatch) == expected != before


def test_modules_that_were_replaced_or_have_hooks_are_called() -> None:
    """Steps read weights only, so such models go through ``forward``."""
    model = make_model()
    assert step_limit(model, 2) is None
    handle = model.blocks[1].register_forward_hook(lambda *_: None)
    assert "has hooks" in str(step_limit(model, 2))
    handle.remove()
    assert step_limit(model, 2) is None

    class Adapter(torch.nn.Linear):
        pass

    mixer_of(model).qkv_proj = Adapter(16, 1)
    assert "blocks.0.mixer.qkv_proj is a Adapter" in str(step_limit(model, 2))
