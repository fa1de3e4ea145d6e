"""Configuration of models and supernet training: plain dataclasses.

They are here, not beside the model and the training loop, because those load torch, and ``--help`` must not. Each class
checks itself in ``__post_init__`` and raises ``ValueError`` naming the value and what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from natsl.space.check import check, check_at_least, check_choice, check_counts
from natsl.space.cost import LayerShape
from natsl.space.policy import Op

# What decides a training besides its settings: how policies are drawn, the gradient clamped, budgets calibrated, the
# memories mixed (since 3 with a bias), parameters without influence stepped (since 3 with zeros as gradients). It is
# stored with every checkpoint and counts up where one of them changes.
TRAINING_VERSION = 3


class Counterfactual(Enum):
    """Which router gradient is computed for the side a chunk was not routed to."""

    none = "none"  # chosen side only, as published
    derivative = "derivative"  # the exact derivative of the relaxation
    insertion = "insertion"  # the exact effect of inserting an unchosen softmax chunk


class Sandwich(Enum):
    """How the policies of one training step share the data."""

    groups = "groups"  # one forward pass, each policy on its own slice of the batch
    accumulate = "accumulate"  # one pass per policy over the whole batch, gradients accumulated


class CalibrationScope(Enum):
    """Over what margins are pooled when a budget becomes a threshold."""

    layer = "layer"
    head = "head"


class Precision(Enum):
    """In what the projections, the residual stream and the routed ops are computed; weights are float32 always."""

    float32 = "float32"
    bfloat16 = "bfloat16"


CHUNK_SIZES = (8, 16, 32, 64, 128)
# Options that came later → what models and trainings of before have.
OLDER_MODEL: dict[str, Any] = {"router_norm": False}
OLDER_TRAIN: dict[str, Any] = {"precision": Precision.float32.value, "router_lr": None}


@dataclass
class ModelConfig:
    """Shape of a routed language model.

    ``layers`` lists the kind of every layer in order: ``delta`` (Gated DeltaNet only), ``softmax`` (attention only) or
    ``routed`` (both memories and a router). Per routing head: key width ``key_dim``, value width ``value_dim``, split
    into ``softmax_per_head`` softmax heads of width ``key_dim / softmax_per_head``. ``router_norm``: routers read the
    mean of a chunk standardised by running statistics of training.
    """

    layers: list[Op] = field(default_factory=lambda: [Op.routed] * 3)
    vocab_size: int = 384
    width: int = 64
    mlp_width: int = 128
    heads: int = 2
    key_dim: int = 16
    value_dim: int = 16
    softmax_per_head: int = 1
    chunk_size: int = 16
    conv_width: int = 4
    rope: bool = False
    rope_theta: float = 10000.0
    tie_embeddings: bool = True
    norm_eps: float = 1e-6
    associative_init: bool = False
    router_norm: bool = False

    def __post_init__(self) -> None:
        self.layers = [check_choice(f"model.layers[{i}]", kind, Op) for i, kind in enumerate(self.layers)]
        check(len(self.layers) > 0, "model.layers", self.layers, "at least one layer is needed")
        counts = ("vocab_size", "width", "mlp_width", "heads", "key_dim", "value_dim", "softmax_per_head", "conv_width")
        check_counts(1, {f"model.{name}": getattr(self, name) for name in counts})
        check(
            type(self.chunk_size) is int and self.chunk_size in CHUNK_SIZES,
            "model.chunk_size",
            self.chunk_size,
            f"it must be one of {', '.join(map(str, CHUNK_SIZES))}",
        )
        for name in ("key_dim", "value_dim"):
            value = getattr(self, name)
            check(
                value % self.softmax_per_head == 0,
                f"model.{name}",
                value,
                f"it must be divisible by model.softmax_per_head = {self.softmax_per_head}",
            )
        if self.rope:
            width = self.key_dim // self.softmax_per_head
            check(width % 2 == 0, "model.key_dim", self.key_dim, "rope needs an even key width per softmax head")
        check(self.norm_eps > 0, "model.norm_eps", self.norm_eps, "it must be > 0")
        check(self.rope_theta > 0, "model.rope_theta", self.rope_theta, "it must be > 0")

    @classmethod
    def stored(cls, plain: Mapping[str, Any]) -> ModelConfig:
        """The configuration of a stored model; what an older version did not store has the value that it had then."""
        return cls(**{**OLDER_MODEL, **plain})

    @property
    def softmax_heads(self) -> int:
        """Number of softmax heads of a layer (Hs = R·G)."""
        return self.heads * self.softmax_per_head

    def layer_shapes(self) -> tuple[LayerShape, ...]:
        """Shapes of the layers in order, as costs are counted from."""
        return tuple(
            LayerShape(
                kind,
                self.width,
                self.heads,
                self.key_dim,
                self.value_dim,
                self.softmax_per_head,
                self.mlp_width,
                self.conv_width,
            )
            for kind in self.layers
        )


@dataclass(frozen=True)
class RouteGradient:
    """How routes are made in training, and how the router gets its gradient from them.

    Budgets become exact quantiles of the batch, pooled as ``calibration`` says; ``project_budget`` takes the direction
    that this undoes out of the gradient. ``route_temperature`` is the straight-through τ in logits; ``route_noise``
    scales the logistic noise on the margins. ``gradient_clamp``: the gradient with respect to the routes is clamped at
    this many times its mean magnitude (0: no clamp). ``detach_router``: no gradient flows from the router into its
    input.
    """

    route_temperature: float = 0.5
    route_noise: float = 0.0
    counterfactual: Counterfactual = Counterfactual.insertion
    counterfactual_rate: float = 1.0
    project_budget: bool = True
    gradient_clamp: float = 10.0
    detach_router: bool = True
    calibration: CalibrationScope = CalibrationScope.layer

    def __post_init__(self) -> None:
        _check_routes("", self)


def _check_routes(prefix: str, values: RouteGradient | SupernetConfig) -> None:
    """Raise ``ValueError`` for what ``RouteGradient`` does not allow; names come after ``prefix``."""
    check_choice(prefix + "counterfactual", values.counterfactual, Counterfactual)
    check_choice(prefix + "calibration", values.calibration, CalibrationScope)
    check_at_least(0, {prefix + k: getattr(values, k) for k in ("route_noise", "gradient_clamp")})
    tau, rate = values.route_temperature, values.counterfactual_rate
    check(tau > 0, prefix + "route_temperature", tau, "it must be > 0")
    check(0 < rate <= 1, prefix + "counterfactual_rate", rate, "it must lie in (0, 1]")


@dataclass
class SupernetConfig:
    """How one set of weights is trained under many policies (sandwich rule) and how the router gets its gradient.

    Budgets of the random policies, averaged over the layers, lie in [``budget_min``, ``budget_max``]; ``anneal_steps``
    widens the range from ``budget_max`` downwards. Policies with a budget per head go down to 0 in the end. The first
    ``dense_steps`` steps train only the largest policy. ``route_noise``: scale of the logistic noise on the margins of
    random policies, in logits. The other settings are those of ``RouteGradient``.
    """

    sandwich: Sandwich = Sandwich.groups
    random_policies: int = 6
    budget_min: float = 0.05
    budget_max: float = 0.6
    anneal_steps: int = 0
    dense_steps: int = 0
    distill: float = 0.0
    route_temperature: float = RouteGradient.route_temperature
    route_noise: float = 0.5
    counterfactual: Counterfactual = RouteGradient.counterfactual
    counterfactual_rate: float = RouteGradient.counterfactual_rate
    project_budget: bool = RouteGradient.project_budget
    gradient_clamp: float = RouteGradient.gradient_clamp
    detach_router: bool = RouteGradient.detach_router
    calibration: CalibrationScope = RouteGradient.calibration
    calibration_points: int = 65
    calibration_sequences: int = 48

    def __post_init__(self) -> None:
        p = "supernet."
        self.sandwich = check_choice(p + "sandwich", self.sandwich, Sandwich)
        self.counterfactual = check_choice(p + "counterfactual", self.counterfactual, Counterfactual)
        self.calibration = check_choice(p + "calibration", self.calibration, CalibrationScope)
        check_counts(0, {p + k: getattr(self, k) for k in ("anneal_steps", "dense_steps", "random_policies")})
        check_at_least(0, {p + "distill": self.distill})
        _check_routes(p, self)
        check(
            0 <= self.budget_min <= self.budget_max <= 1,
            p + "budget_min/budget_max",
            (self.budget_min, self.budget_max),
            "0 ≤ budget_min ≤ budget_max ≤ 1",
        )
        check_counts(17, {p + "calibration_points": self.calibration_points})
        check_counts(1, {p + "calibration_sequences": self.calibration_sequences})
        check(
            self.distill == 0 or self.sandwich is Sandwich.accumulate,
            p + "distill",
            self.distill,
            "distillation compares policies on the same data: it needs supernet.sandwich=accumulate",
        )

    def route_gradient(self) -> RouteGradient:
        """What ``RoutedLM.forward`` is given of these settings in training."""
        return RouteGradient(**{item.name: getattr(self, item.name) for item in fields(RouteGradient)})


@dataclass
class TrainConfig:
    """Optimiser and schedule: AdamW, linear warm-up, cosine to ``lr · lr_final``, clipping by norm.

    ``router_lr``: ``lr`` of the routers (null: that of the rest).
    ``precision``: of the computation, in training and wherever the supernet is run afterwards (search, evaluation,
    generation, export); weights and losses are float32 always.
    """

    steps: int = 220
    batch_size: int = 24
    precision: Precision = Precision.float32
    lr: float = 6e-3
    router_lr: float | None = None
    lr_final: float = 0.05
    warmup_steps: int = 30
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.05
    clip: float = 1.0
    router_clip: float = 1.0
    checkpoint_every: int = 20
    keep_checkpoints: int = 2
    max_bad_steps: int = 5
    log_every: int = 10

    def __post_init__(self) -> None:
        p = "train."
        check_counts(1, {p + k: getattr(self, k) for k in ("steps", "batch_size", "checkpoint_every")})
        check_counts(1, {p + k: getattr(self, k) for k in ("keep_checkpoints", "max_bad_steps", "log_every")})
        check_counts(0, {p + "warmup_steps": self.warmup_steps})
        check_at_least(0, {p + "weight_decay": self.weight_decay})
        self.precision = check_choice(p + "precision", self.precision, Precision)
        for name in ("lr", "router_lr", "clip", "router_clip"):
            value = getattr(self, name)
            check(value is None or (math.isfinite(value) and value > 0), p + name, value, "it must be > 0")
        check(0 <= self.lr_final <= 1, p + "lr_final", self.lr_final, "it must lie in [0, 1]")
        for name in ("beta1", "beta2"):
            check(0 <= getattr(self, name) < 1, p + name, getattr(self, name), "it must lie in [0, 1)")


def check_batch(kinds: list[Op], train: TrainConfig, supernet: SupernetConfig) -> None:
    """Raise ``ValueError`` unless the sandwich fits the batch; a model without routed layers has one policy only."""
    policies = 2 + supernet.random_policies
    if supernet.sandwich is Sandwich.groups and Op.routed in kinds:
        check(
            train.batch_size % policies == 0,
            "train.batch_size",
            train.batch_size,
            f"it must be a multiple of the {policies} policies of a step (2 + supernet.random_policies)",
        )


def check_chunks(chunk_size: int, seq_len: int) -> None:
    """Raise ``ValueError`` unless sequences have a complete chunk: without one there is nothing to calibrate on."""
    check(
        seq_len >= chunk_size,
        "data.seq_len",
        seq_len,
        f"calibration needs complete chunks: sequences are shorter than chunk_size = {chunk_size}",
    )
