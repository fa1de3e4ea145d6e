"""Exports in transformers: loading, generation in all its kinds, the cache, and what is refused."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from natsl.config import ModelConfig, Precision
from natsl.errors import UserError
from natsl.export import export_choice
from natsl.files import read_json, to_plain, write_json
from natsl.generate import Sampling, generate
from natsl.load import Choice, load_exported
from natsl.model import RoutedLM
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from natsl.verify import checks
from tests.run_helpers import BUDGET, KINDS, make_export, make_model, make_run
from tests.test_load import Trap, seal

pytest.importorskip("transformers", minversion="5.23")
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from natsl.hf.config import NatslConfig
from natsl.hf.model import NatslCache, NatslForCausalLM

ROOT = Path(__file__).parents[1]
PROMPTS = ([*b"def main(x, y):"], [97], [*b"a longer one, of more chunks ", 259, 331, *b" than two"])
COUNT = 21
STATIC = RoutingPolicy((LayerPolicy(budget=(1.0, 0.0)), LayerPolicy(Op.delta), LayerPolicy(budget=0.0)), 8)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def lm(exported: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(exported)


@pytest.fixture(scope="module")
def expected(exported: Path) -> list[list[int]]:
    """What natsl itself puts after each prompt."""
    model, policy = load_exported(exported)
    texts = [list(generate(model, policy, prompt, COUNT, Sampling(0))) for prompt in PROMPTS]
    assert all(len(set(tokens)) > 9 for tokens in texts)
    kept = [layer.route.mean() for layer in model(torch.tensor([PROMPTS[2] + texts[2]]), policy).layers]
    assert all(0 < float(kept[i]) < 1 for i in (0, 2))
    return texts


def batch(prompts: Any = PROMPTS) -> dict[str, Tensor]:
    """Padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[384] * (longest - len(prompt)) + prompt for prompt in prompts])
    return {"input_ids": ids, "attention_mask": (ids != 384).long()}


def after(prompts: Tensor, output: Tensor) -> list[list[int]]:
    return [[int(token) for token in row] for row in output[:, prompts.shape[1] :]]


def test_what_is_loaded(lm: Any, exported: Path) -> None:
    model, policy = load_exported(exported)
    assert type(lm) is NatslForCausalLM
    assert (lm.config.policy, lm.config.vocab_size, lm.config.hidden_size) == (policy, 384, 16)
    assert AutoConfig.from_pretrained(exported).policy == policy
    tokens = torch.randint(384, (2, 43))
    assert torch.equal(lm(tokens).logits, model(tokens, policy).logits)
    assert lm.generation_config.pad_token_id == 384
    assert torch.equal(lm(tokens, policy=STATIC).logits, model(tokens, STATIC).logits)


def test_greedy(lm: Any, expected: list[list[int]]) -> None:
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        ids = torch.tensor([prompt])
        for options in ({}, {"use_cache": False}):
            assert after(ids, lm.generate(ids, max_new_tokens=COUNT, **options)) == [tokens]


def test_another_policy(lm: Any) -> None:
    ids = torch.tensor([PROMPTS[2]])
    expected = list(generate(lm.model, STATIC, PROMPTS[2], COUNT, Sampling(0)))
    assert expected != list(generate(lm.model, BUDGET, PROMPTS[2], COUNT, Sampling(0)))
    assert after(ids, lm.generate(ids, max_new_tokens=COUNT, policy=STATIC)) == [expected]


@pytest.mark.parametrize("size", [None, 3, 8, 11], ids=["at once", "3", "a chunk", "11"])
@pytest.mark.parametrize("mask", [True, False], ids=["mask", "no mask"])
def test_a_padded_batch_gives_what_its_rows_give(
    mask: bool, size: int | None, lm: Any, expected: list[list[int]]
) -> None:
    inputs = batch() if mask else {"input_ids": batch()["input_ids"]}
    output = lm.generate(**inputs, max_new_tokens=COUNT, prefill_chunk_size=size)
    assert after(inputs["input_ids"], output) == expected


def test_rows_that_end_early(lm: Any, expected: list[list[int]]) -> None:
    end, inputs = expected[0][4], batch()
    output = after(inputs["input_ids"], lm.generate(**inputs, max_new_tokens=COUNT, eos_token_id=end))
    for row, tokens in zip(output, expected, strict=True):
        own = tokens[: tokens.index(end) + 1] if end in tokens else tokens
        assert row == own + [384] * (len(row) - len(own))


KINDS_OF_SEARCH: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True},
}


@pytest.mark.parametrize("options", KINDS_OF_SEARCH.values(), ids=KINDS_OF_SEARCH.keys())
def test_a_cache_changes_nothing(options: dict[str, Any], lm: Any) -> None:
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        outputs.append(lm.generate(**batch(), max_new_tokens=COUNT, use_cache=use_cache, **options))
    assert torch.equal(*outputs)
    assert len(outputs[0]) == 3 * options.get("num_return_sequences", 1)


def test_a_prompt_is_read_once_and_continued(lm: Any, exported: Path) -> None:
    model, policy = load_exported(exported)

    def own(tokens: list[int]) -> list[int]:
        return list(generate(model, policy, tokens, COUNT, Sampling(0)))

    prompt = PROMPTS[2]
    read = lm.new_cache()
    lm(torch.tensor([prompt[:-5]]), past_key_values=read)
    for more in ([], [1, 2, 3]):
        cache, ids = copy.deepcopy(read), torch.tensor([prompt + more])
        text = lm.generate(ids, max_new_tokens=COUNT, past_key_values=cache)
        assert after(ids, text) == [own(prompt + more)]
        longer = lm.generate(text, max_new_tokens=COUNT, past_key_values=cache)  # all ids
        assert after(text, longer) == [own(text[0].tolist())]
        whole = torch.cat((longer, torch.tensor([[100, 101]])), 1)
        new = whole[:, cache.get_seq_length() :]  # new ids, and a mask of all
        last = lm.generate(new, attention_mask=torch.ones_like(whole), max_new_tokens=COUNT, past_key_values=cache)
        assert after(new, last) == [own(whole[0].tolist())]
    assert read.get_seq_length() == len(prompt) - 5


def test_rows_of_a_cache(lm: Any) -> None:
    inputs = batch()
    cache = lm.new_cache()
    assert (cache.get_seq_length(), cache.get_max_length(), cache.get_mask_sizes(3, 0)) == (0, -1, (3, 0))
    with torch.no_grad():
        lm(**inputs, past_key_values=cache)
        following = [torch.randint(384, (3, n)) for n in (1, 9, 17)]
        expected = [lm(part, past_key_values=copied).logits for copied in [copy.deepcopy(cache)] for part in following]
        for rows, name in (
            ([2, 0, 0, 1], "batch_select_indices"),
            ([1, 1, 1], "reorder_cache"),
            ([0, 0, 1, 1, 2, 2], ""),
        ):
            own, index = copy.deepcopy(cache), torch.tensor(rows)
            if name:
                getattr(own, name)(index)
            else:
                own.batch_repeat_interleave(2)
            for part, logits in zip(following, expected, strict=True):
                found = lm(part[index], past_key_values=own).logits
                torch.testing.assert_close(found, logits[index], rtol=1e-5, atol=1e-5)
    cache.reset()
    assert cache.get_seq_length() == 0
    found, once = lm(following[2], past_key_values=cache).logits, lm(following[2]).logits
    torch.testing.assert_close(found, once, rtol=1e-5, atol=1e-5)


def test_right_padding_and_kept_logits(lm: Any) -> None:
    ids = torch.tensor([[*PROMPTS[0], 384, 384], [*PROMPTS[0], 1, 2]])
    alone = lm(ids[:1, :-2]).logits
    torch.testing.assert_close(lm(ids).logits[:1, :-2], alone)
    torch.testing.assert_close(lm(ids, logits_to_keep=5).logits[:1, :3], alone[:, -3:])
    torch.testing.assert_close(lm(**batch(), logits_to_keep=1).logits, lm(**batch()).logits[:, -1:])
    assert torch.equal(lm(ids, logits_to_keep=torch.tensor([0, 3])).logits, lm(ids).logits[:, [0, 3]])
    outputs = lm(ids, return_dict=False, use_cache=True)
    assert isinstance(outputs, tuple)
    assert isinstance(outputs[1], NatslCache)


def test_a_loss(lm: Any) -> None:
    ids = torch.randint(384, (2, 19))
    output = lm(ids, labels=ids)
    torch.testing.assert_close(output.loss, output.loss.new_tensor(float(_mean_loss(output.logits.detach(), ids))))
    padded = torch.cat((torch.full((2, 4), 384), ids), 1)  # what padding gets is not scored
    torch.testing.assert_close(lm(padded, labels=padded).loss, output.loss)
    trained = copy.deepcopy(lm).train()
    trained(ids, labels=ids).loss.backward()
    trainable = [p for p in trained.parameters() if p.requires_grad]
    assert len(trainable) > 20
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trainable)


def _mean_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return -logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_what_routes_depend_on_is_never_rounded(dtype: torch.dtype, exported: Path, lm: Any) -> None:
    half: Any = AutoModelForCausalLM.from_pretrained(exported, dtype=dtype)
    exact, rounded = dict(lm.state_dict()), half.state_dict()
    precise = {name for name, weight in rounded.items() if weight.dtype is not dtype}
    assert {name.split(".")[-1] for name in precise} == {
        *("A_log", "dt_bias", "weight", "levels", "by_head", "by_layer", "scope")
    }
    for name in precise:
        torch.testing.assert_close(rounded[name], exact[name], rtol=0, atol=0, equal_nan=True)
        assert name.endswith(".weight") == ("router" in name)
    tokens = torch.randint(384, (2, 30))
    # of the mean: a margin near its threshold may route a chunk otherwise
    assert 0 < float((half(tokens).logits.float() - lm(tokens).logits).abs().mean()) < 0.1
    ids = batch()["input_ids"]
    texts = [half.generate(ids, max_new_tokens=COUNT, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*texts)


def test_a_loaded_model_is_not_cast(lm: Any) -> None:
    with pytest.raises(ValueError, match=r"what routes depend on has been rounded: load with from_pretrained"):
        copy.deepcopy(lm).to(torch.bfloat16)(torch.tensor([[1, 2]]))


def faults(folder: Path) -> list[str]:
    """What the checks find, by both loaders."""
    results = list(checks(folder))
    assert len({result.loader for result in results}) == 2
    return [result.line() for result in results if result.fault is not None]


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the fresh process."""
    monkeypatch.setattr("natsl.export.verify", lambda folder: [])


@pytest.mark.usefixtures("fast")
def test_an_export_in_bfloat16(tmp_path: Path) -> None:
    make_run(tmp_path)
    folder = export_choice(Choice(run="r", root=str(tmp_path)), dtype=Precision.bfloat16)
    assert faults(folder) == []
    stored = AutoModelForCausalLM.from_pretrained(folder)
    assert stored.dtype is torch.bfloat16
    model, policy = load_exported(folder)
    assert model.precision is Precision.bfloat16
    tokens = torch.randint(384, (2, 30))
    torch.testing.assert_close(stored(tokens).logits, model(tokens, policy).logits, rtol=0.02, atol=0.02)


def test_a_saved_model_loads_again(lm: Any, tmp_path: Path) -> None:
    lm.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(384, (1, 20))
    assert torch.equal(again(tokens).logits, lm(tokens).logits)
    assert again.config.policy == lm.config.policy


def test_an_export_is_not_overwritten(lm: Any, exported: Path) -> None:
    with pytest.raises(ValueError, match="is an exported model with checksums: choose another folder"):
        lm.save_pretrained(exported)


UNSUPPORTED: dict[str, tuple[Callable[[Any], object], str]] = {
    "several prompts": (lambda lm: lm.generate(**batch(), prompt_lookup_num_tokens=3), "only supported for batch_size"),
    "crop": (lambda lm: lm.new_cache().crop(-1), r"nothing to go back to: call activate_past_recording\(\) before"),
    "positive": (lambda lm: lm.new_cache().crop(1), r"crop\(1\): give the number of tokens that are to go as a neg"),
    "static": (lambda lm: lm.generate(**batch(), cache_implementation="static"), "'static' is not supported"),
    "batches": (lambda lm: lm.generate_batch([[1]]), "generate_batch is not supported"),
    "resizing": (lambda lm: lm.resize_token_embeddings(390), "cannot be resized"),
    "two caches": (
        lambda lm: lm(torch.tensor([[1]]), past_key_values=lm.new_cache(), cache=lm.new_cache()),
        "two names of one argument",
    ),
    "packed": (
        lambda lm: lm(torch.tensor([[1, 2, 3]]), position_ids=torch.tensor([[0, 1, 0]])),
        "several sequences in a row are not supported",
    ),
    "holes": (lambda lm: lm(torch.ones(1, 3).long(), attention_mask=torch.tensor([[1, 0, 1]])), "mask has holes"),
    "mask": (lambda lm: lm(torch.ones(1, 3).long(), attention_mask=torch.ones(1, 2)), r"it must be \(1, 3\)"),
    "id": (lambda lm: lm(torch.tensor([[385]])), "must lie in"),
}


@pytest.mark.parametrize(("call", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_what_is_refused(call: Callable[[Any], object], message: str, lm: Any) -> None:
    with pytest.raises(ValueError, match=message):
        call(lm)


def test_caches_of_other_models(lm: Any, expected: list[list[int]]) -> None:
    ids = torch.tensor([PROMPTS[0]])
    output = lm.generate(ids, max_new_tokens=COUNT, past_key_values=DynamicCache())  # an empty one is replaced
    assert after(ids, output) == expected[:1]
    used = DynamicCache()
    used.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    with pytest.raises(ValueError, match="the cache is a DynamicCache of another model"):
        lm(ids, past_key_values=used)
    cache = lm.new_cache()
    lm(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="the cache holds 1 sequences, not 3"):
        lm(**batch(), past_key_values=cache)


def damaged(exported: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    import shutil

    return Path(shutil.copytree(exported, tmp_path / "copy"))


def test_a_flipped_bit(exported: Path, tmp_path: Path) -> None:
    folder = damaged(exported, tmp_path)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-100] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"checksum error: .*model\.safetensors has changed"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_weights_that_are_not_finite_or_missing(exported: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = damaged(exported, tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = "model.blocks.1.mlp.out_proj.weight"
    save_file({**weights, name: weights[name] * float("nan")}, folder / "model.safetensors", {"format": "pt"})
    seal(folder)
    with pytest.raises(UserError, match="hold numbers that are not finite"):
        AutoModelForCausalLM.from_pretrained(folder)
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    seal(folder)
    with pytest.raises(UserError, match=f"lacks weights of the model: {name}"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_pickle_posing_as_weights_is_never_executed(exported: Path, tmp_path: Path) -> None:
    folder = damaged(exported, tmp_path)
    torch.save(Trap(tmp_path / "executed"), folder / "model.safetensors")
    seal(folder)
    with pytest.raises(Exception, match=r"(?i)header|deserializing"):
        AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / "manifest.json").unlink()
    with pytest.raises(OSError, match="safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert not (tmp_path / "executed").exists()


def test_a_policy_that_does_not_fit(exported: Path, tmp_path: Path) -> None:
    folder = damaged(exported, tmp_path)
    config = read_json(folder / "config.json")
    config["natsl"]["policy"] = RoutingPolicy.all_softmax([Op.routed] * 3, 8).to_dict()
    write_json(folder / "config.json", config)
    seal(folder)
    with pytest.raises(ValueError, match="this layer is of kind delta"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("natsl", "message"),
    [
        ({}, "has no natsl.model"),
        ({"model": {"foo": 1}, "policy": {}}, "foo"),
        ({"model": {}, "policy": {}}, "policy has no"),
    ],
    ids=["nothing", "unknown", "no policy"],
)
def test_configurations_that_cannot_be_used(natsl: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NatslConfig(natsl=natsl)


def test_a_model_from_a_configuration_alone() -> None:
    lm = NatslForCausalLM(NatslConfig())
    assert lm(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 384)


ROPE = ModelConfig(
    layers=[Op.routed, Op.softmax, Op.delta],
    width=16,
    mlp_width=16,
    key_dim=16,
    value_dim=8,
    softmax_per_head=2,
    chunk_size=8,
    rope=True,
    tie_embeddings=False,
    router_norm=True,
)


def test_another_shape_of_model(tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = RoutedLM(ROPE).eval()
    layers = (LayerPolicy(threshold=(0.0, -0.001)), LayerPolicy(Op.softmax), LayerPolicy(Op.delta))
    policy = RoutingPolicy(layers, 8)
    own = {"model": to_plain(ROPE), "policy": policy.to_dict(), "calibration_points": model.calibration.points}
    lm: Any = NatslForCausalLM(NatslConfig(natsl=own))
    lm.model.load_state_dict(model.state_dict())
    lm.save_pretrained(tmp_path)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(lm.get_output_embeddings().weight, model.head.weight)  # type: ignore[union-attr]
    singles = [list(generate(model, policy, prompt, COUNT, Sampling(0))) for prompt in PROMPTS]
    output = lm.generate(**batch(), max_new_tokens=COUNT, pad_token_id=384)
    assert after(batch()["input_ids"], output) == singles


def fresh(code: str, *arguments: str, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", code, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


ORDERS = {
    "natsl first": "import natsl; from transformers import AutoConfig; AutoConfig.from_pretrained(sys.argv[1]); "
    "from transformers import AutoModelForCausalLM",
    "transformers first": "from transformers import AutoModelForCausalLM; import natsl",
}


@pytest.mark.parametrize("imports", ORDERS.values(), ids=ORDERS.keys())
def test_importing_natsl_is_enough(imports: str, exported: Path, tmp_path: Path) -> None:
    code = f"import sys; {imports}; print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    assert fresh(code, str(exported), cwd=tmp_path) == "NatslForCausalLM\n"


def test_the_example_of_the_readme_runs_by_itself(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
        if "from transformers" in block
    )
    exec(example.replace("runs/mine/export/half", str(exported)), {})
    assert capsys.readouterr().out.startswith("['def main(")


def test_importing_natsl_loads_no_transformers(tmp_path: Path) -> None:
    code = "import sys, natsl; print('transformers' in sys.modules, 'torch' in sys.modules); import natsl.load"
    assert fresh(code + "; print('transformers' in sys.modules)", cwd=tmp_path) == "False False\nFalse\n"


def test_an_unknown_transformers_still_imports(tmp_path: Path) -> None:
    package = tmp_path / "transformers" / "models" / "auto"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parents[1]):
        (folder / "__init__.py").touch()
    for name in ("configuration_auto", "modeling_auto"):
        (package / f"{name}.py").write_text("there = True")
    code = "import natsl, warnings; warnings.simplefilter('always'); import sys; sys.path.insert(0, sys.argv[1]);"
    code += "from transformers.models.auto import configuration_auto, modeling_auto; print(modeling_auto.there)"
    assert fresh(code, str(tmp_path), cwd=ROOT) == "True\n"


@pytest.mark.usefixtures("fast")
def test_a_model_trimmed_to_its_policy(tmp_path: Path) -> None:
    make_run(tmp_path)
    policy = RoutingPolicy((LayerPolicy(Op.delta), LayerPolicy(Op.delta), BUDGET.layers[2]), 8)
    (tmp_path / "p.json").write_text(policy.to_json())
    folder = export_choice(Choice(run="r", root=str(tmp_path), policy=str(tmp_path / "p.json")))
    assert faults(folder) == []
    model, stored = load_exported(folder)
    assert (model.kinds, model.supernet_kinds, stored) == ([Op.delta, Op.delta, Op.routed], KINDS, policy)
    names = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert not [name for name in names if name.startswith("model.blocks.0") and ("router" in name or "q_norm" in name)]
    tokens = torch.randint(384, (2, 30))
    torch.testing.assert_close(model(tokens, policy).logits, make_model()(tokens, policy).logits)


@pytest.mark.parametrize("first", ["natsl.hf.model", "natsl.hf.config"])
def test_any_module_may_be_imported_first(first: str, tmp_path: Path) -> None:
    code = (
        f"import {first}; from transformers import AutoConfig, AutoModelForCausalLM; "
        "print(type(AutoModelForCausalLM.from_config(AutoConfig.for_model('natsl'))).__name__)"
    )
    assert fresh(code, cwd=tmp_path).strip() == "NatslForCausalLM"


def test_training_on_leaves_routers_as_they_are(exported: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported).train()
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    tokens = torch.randint(256, (2, 40))
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    moved = {name for name, x in model.named_parameters() if not torch.equal(x, before[name])}
    assert any(".qkv_proj." in name for name in moved)
    assert any(".router." in name for name in before)
    assert not any(".router." in name for name in moved)
