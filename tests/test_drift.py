"""Ten thousand tokens decoded one by one give what one pass over all of them gives, at the end as at the beginning."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from natsl.config import ModelConfig, Precision
from natsl.decode import Decoder
from natsl.model import RoutedLM
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy

KINDS = [Op.routed, Op.delta, Op.routed, Op.softmax]
ROUTED = LayerPolicy(threshold=0.0)
HEADS = LayerPolicy(budget=(1.0, 0.0))  # of a half-precision model margins near the threshold may fall on either side
TOKENS, BOUND = 10_240, {Precision.float32: 1e-4, Precision.bfloat16: 0.05}  # share of the largest logit


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes minutes in Triton's interpreter")
@pytest.mark.parametrize("precision", list(Precision), ids=lambda precision: precision.value)
def test_decoding_does_not_drift(precision: Precision) -> None:
    torch.manual_seed(0)
    config = ModelConfig(layers=KINDS, width=128, mlp_width=256, heads=2, key_dim=32, value_dim=64, chunk_size=16)
    model = RoutedLM(config, precision=precision).cuda().eval()
    routed = ROUTED if precision is Precision.float32 else HEADS
    layers = (routed, LayerPolicy(Op.delta), routed, LayerPolicy(Op.softmax))
    policy = RoutingPolicy(layers, config.chunk_size)
    tokens = torch.randint(config.vocab_size, (1, TOKENS), device="cuda")
    with torch.no_grad():
        whole = model(tokens, policy)
        assert 0 < float(whole.layers[2].route.mean()) < 1
        assert whole.logits is not None
        cache = model.new_cache(1)
        decoder = Decoder(model, policy, cache)
        steps = torch.stack([decoder.step(token).clone() for token in tokens[0].split(1)], 1)
        expected = whole.logits.float()
        error = (steps.float() - expected).abs().amax(-1)[0] / expected.abs().max()
    assert float(error.max()) < BOUND[precision]
    first, last = error[:1024].mean(), error[-1024:].mean()
    assert float(last) < 2 * float(first)
    pages, routes = cache.layers[2].pages, whole.layers[2].route
    assert pages is not None
    assert torch.equal(pages.kept[0], routes[0].sum(0).long())
