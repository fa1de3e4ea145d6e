"""Tokens that transformers has drafted and takes back: assisted decoding, prompt lookup, and the cache under both."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from natsl.generate import Sampling, generate
from natsl.model import RoutedLM
from natsl.space.policy import LayerPolicy, RoutingPolicy
from tests.run_helpers import BUDGET, make_export

pytest.importorskip("transformers", minversion="5.23")
from transformers import AutoModelForCausalLM

from natsl.hf.config import NatslConfig
from natsl.hf.model import NatslForCausalLM, NatslLayer
from tests.test_hf import COUNT, PROMPTS, STATIC, after, batch


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def lm(exported: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(exported)


def test_columns_taken_back(lm: Any) -> None:
    """Of rows with padding on both sides; what was read before, or by a call for its last logits only, stays."""
    inputs, more = batch(), torch.randint(384, (3, 20))
    more[1, 14:] = 384
    with torch.no_grad():
        for back in (1, 6, 13, 20):
            cache, fresh = lm.new_cache(), lm.new_cache()
            lm(**inputs, past_key_values=cache)
            cache.activate_past_recording()
            for part in more.split(9, 1):
                lm(part, past_key_values=cache)
            copied, chosen = copy.deepcopy(cache), copy.deepcopy(cache)
            for own in (cache, copied):
                own.crop(-back)
                own.crop(0)
                lm(**inputs, past_key_values=fresh)
                if back < 20:
                    lm(more[:, :-back], past_key_values=fresh)
                assert own.get_seq_length() == fresh.get_seq_length()
                assert torch.equal(own.layer.state.lengths, fresh.layer.state.lengths)
                found, logits = (lm(more[:, :14], past_key_values=x).logits for x in (own, fresh))
                torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)
                fresh.reset()
            with pytest.raises(ValueError, match=r"crop\(-15\): only the last 14 tokens can be taken back"):
                cache.crop(-15)
            chosen.batch_repeat_interleave(2)
            with pytest.raises(ValueError, match="nothing to go back to"):
                chosen.crop(-1)
        cache = lm.new_cache()
        cache.activate_past_recording()
        expected = lm(**inputs).logits[:, -3:]
        found = lm(**inputs, past_key_values=cache, logits_to_keep=3).logits
        torch.testing.assert_close(found[::2], expected[::2], rtol=1e-5, atol=1e-5)  # the other has one token
        with pytest.raises(ValueError, match=r"crop\(-4\): only the last 3 tokens can be taken back"):
            cache.crop(-4)
        cache.crop(-2)
        found = lm(inputs["input_ids"][:, -2:], past_key_values=cache, logits_to_keep=2).logits
        torch.testing.assert_close(found[::2], expected[::2, -2:], rtol=1e-5, atol=1e-5)


def draft_of(lm: Any, exported: Path, name: str) -> dict[str, Any]:
    """Options of ``generate`` that have tokens drafted."""
    if name == "lookup":
        return {"prompt_lookup_num_tokens": 10}
    draft = lm if name == "itself" else AutoModelForCausalLM.from_pretrained(exported)
    if name == "another policy":
        draft.config.natsl["policy"] = STATIC.to_dict()
    elif name == "another model":
        torch.manual_seed(5)
        draft = NatslForCausalLM(NatslConfig())
    draft.generation_config.num_assistant_tokens = 4 if name == "another model" else 11
    draft.generation_config.assistant_confidence_threshold = 0
    return {"assistant_model": draft}


DRAFTS = ["itself", "another policy", "another model", "lookup"]


@pytest.mark.parametrize("name", DRAFTS)
def test_drafted_tokens_change_nothing(name: str, lm: Any, exported: Path) -> None:
    options = draft_of(lm, exported, name)
    for prompt in PROMPTS[1:]:
        ids, tokens = torch.tensor([prompt]), list(generate(lm.model, BUDGET, prompt, COUNT, Sampling(0)))
        output = lm.generate(ids, max_new_tokens=COUNT, do_sample=False, return_dict_in_generate=True, **options)
        assert after(ids, output.sequences) == [tokens]
        cache = output["cache" if "cache" in output else "past_key_values"]
        assert cache.get_seq_length() == len(prompt) + COUNT - 1
    longer = lm.generate(output.sequences, max_new_tokens=9, past_key_values=cache)  # goes on
    assert cache.layer.state.recording is None
    assert torch.equal(longer, lm.generate(output.sequences, max_new_tokens=9))


def test_drafted_tokens_under_a_policy_of_the_call(lm: Any, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of them are right, and some not; the model that drafts has its own policy."""
    removed, policies, crop, forward = [], set(), NatslLayer.crop, RoutedLM.forward

    def counted(self: NatslLayer, tokens_to_remove: int) -> None:
        removed.append(tokens_to_remove)
        crop(self, tokens_to_remove)

    def seen(self: RoutedLM, tokens: Tensor, policy: Any, **options: Any) -> Any:
        policies.add((self is lm.model, policy.to_json()))
        return forward(self, tokens, policy, **options)

    other = RoutingPolicy((LayerPolicy(budget=0.9), *BUDGET.layers[1:]), 8)
    tokens = list(generate(lm.model, other, PROMPTS[2], COUNT, Sampling(0)))
    options, ids = draft_of(lm, exported, "another policy"), torch.tensor([PROMPTS[2]])
    monkeypatch.setattr(NatslLayer, "crop", counted)
    monkeypatch.setattr(RoutedLM, "forward", seen)
    assert after(ids, lm.generate(ids, max_new_tokens=COUNT, policy=other, **options)) == [tokens]
    assert min(removed) < -4
    assert len(set(removed)) > 3
    assert policies == {(True, other.to_json()), (False, STATIC.to_json())}


@pytest.mark.parametrize("name", DRAFTS)
def test_drafted_tokens_when_sampling(name: str, lm: Any, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that reads all that stays again, from the first token on, gives the same draws."""
    options = draft_of(lm, exported, name) | {"do_sample": True, "top_k": 5, "max_new_tokens": 12}

    def texts() -> list[list[int]]:
        torch.manual_seed(4)
        return [after(ids, lm.generate(ids, **options))[0] for ids in (torch.tensor([p]) for p in PROMPTS[1:])]

    expected, forward, known = texts(), RoutedLM.forward, dict[Any, tuple[list[int], Any]]()

    def remembered(self: RoutedLM, tokens: Tensor, policy: Any, **more: Any) -> Any:
        output = forward(self, tokens, policy, **more)
        if more.get("cache") is not None:
            read, _ = known.get(more["cache"], ([], None))
            known[more["cache"]] = [*read, *tokens[0].tolist()], policy
        return output

    def reread(self: Any, lengths: list[int], model: RoutedLM) -> None:
        ids, policy = known[self]
        fresh = model.new_cache(1)
        known[self] = ids[: lengths[0]], policy
        if lengths[0]:
            forward(model, torch.tensor([known[self][0]]), policy, cache=fresh)
        self.layers, self.lengths = fresh.layers, fresh.lengths
        self.record()

    monkeypatch.setattr(RoutedLM, "forward", remembered)
    monkeypatch.setattr("natsl.cache.Cache.crop", reread)
    assert texts() == expected
