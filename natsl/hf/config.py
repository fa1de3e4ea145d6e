"""``NatslConfig``: the configuration of an export, as transformers reads it."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from natsl.config import ModelConfig, Precision
from natsl.files import to_plain
from natsl.space.check import check_choice
from natsl.space.policy import Op, RoutingPolicy


class NatslConfig(PreTrainedConfig):
    """All that natsl knows of a model is in the field ``natsl``; the rest is transformers' own.

    ``natsl``: ``model`` (the fields of ``ModelConfig``), ``policy`` (see docs/method.md), ``precision`` (what a model
    with float32 weights computes in), ``calibration_points``; what natsl writes besides is not read here. Without it, a
    small untrained model whose layers keep every chunk. Raises ``ValueError`` for what does not fit together.
    """

    model_type = "natsl"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    natsl: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.natsl is None:
            shape = ModelConfig()
            policy = RoutingPolicy.all_softmax(shape.layers, shape.chunk_size)
            self.natsl = {"model": to_plain(shape), "policy": policy.to_dict()}
        for name in ("model", "policy"):
            if name not in self.natsl:
                raise ValueError(f"the configuration has no natsl.{name}: it is not of an export of natsl")
        try:
            shape = self.shape
        except TypeError as error:
            raise ValueError(f"natsl.model cannot be read: {error}") from None
        self.policy.check(shape.layers, shape.chunk_size, shape.heads)
        self.precision  # noqa: B018  # raises
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    @property
    def shape(self) -> ModelConfig:
        """Shape of the model."""
        return ModelConfig.stored(self._own["model"])

    @property
    def policy(self) -> RoutingPolicy:
        """The policy that the model runs under."""
        return RoutingPolicy.from_dict(self._own["policy"])

    @property
    def supernet_kinds(self) -> list[Op]:
        """Kinds of the layers before they lost what the policy does not use."""
        return [Op(kind) for kind in self._own.get("supernet_layers", self.shape.layers)]

    @property
    def precision(self) -> Precision:
        """What a model with float32 weights computes in."""
        return check_choice("natsl.precision", self._own.get("precision", Precision.float32), Precision)

    @property
    def calibration_points(self) -> int:
        """Number of levels of the calibration table."""
        return int(self._own.get("calibration_points", 65))

    @property
    def vocab_size(self) -> int:
        """Number of tokens; the id after the last one is taken for padding."""
        return self.shape.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.shape.width

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers."""
        return len(self.shape.layers)

    @property
    def num_attention_heads(self) -> int:
        """Number of softmax heads of a layer."""
        return self.shape.softmax_heads

    @property
    def _own(self) -> dict[str, Any]:
        assert self.natsl is not None, "__post_init__ has set it"
        return self.natsl


def register() -> None:
    """Make ``AutoConfig`` know it."""
    AutoConfig.register(NatslConfig.model_type, NatslConfig, exist_ok=True)


register()
