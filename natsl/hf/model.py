"""``NatslForCausalLM``: an export in transformers, and the cache that its ``generate`` goes on from.

Shapes: B sequences, T tokens, V vocabulary, P columns that a cache has read, padding included.
"""

from __future__ import annotations

import copy
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from natsl import cache as states
from natsl.decode import Decoder, StepWeights, step_limit, steps_on
from natsl.errors import UserError
from natsl.hf.config import NatslConfig
from natsl.layout import Layout
from natsl.load import FLOAT32, PREFIX, check_model, file_faults
from natsl.model import RoutedLM
from natsl.space.policy import RoutingPolicy

# What ``generate`` calls the cache: until transformers 5.23 the first, from 5.24 on the second.
_CACHE = "cache" if any(item.name == "cache" for item in fields(CausalLMOutputWithPast)) else "past_key_values"


class NatslLayer(CacheLayerMixin):
    """A ``natsl.cache.Cache`` with the interface of transformers: all layers of the model in one.

    ``state``: None before the first call. ``columns``: P, the same for all rows, as ``generate`` counts; how many real
    tokens each row has read, from which chunks count, is ``state.lengths``. ``record_past``: whether ``crop`` is to be
    possible; ``recorded``: which of the columns are real that it can take back, bool [B,·] in pieces.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state: states.Cache | None = None
        self.columns = 0
        self.record_past = False
        self.recorded: list[Tensor] = []
        self._model: RoutedLM | None = None
        self._decoder: Decoder | None = None
        self._policy: RoutingPolicy | None = None  # of its last step

    def __deepcopy__(self, memo: dict[int, Any]) -> NatslLayer:
        copied = copy.copy(self)
        copied.state, copied.recorded, copied._model = copy.deepcopy(self.state, memo), [*self.recorded], self._model
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": None, "_decoder": None}  # which the next call gives it again

    def begin(self, model: RoutedLM, batch: int) -> states.Cache:
        """The state that a call of ``model`` goes on from, of ``batch`` rows where there is none yet."""
        self._model = model
        if self.state is None:
            self.state = model.new_cache(batch)
        if not self.record_past:
            self.state.recording = None
        elif self.state.recording is None:
            self._record()
        return self.state

    def decodes(self, input_ids: Tensor, weights: StepWeights | None) -> bool:
        """Whether a call with these tokens, all real, is a step of ``Decoder``; ``weights``: those of the last step."""
        state, model = self.state, self._model
        if state is None or model is None or input_ids.shape[1] != 1 or not self.columns or state.recording is not None:
            return False
        if not steps_on(input_ids.device):
            return False
        last = self._decoder
        goes_on = last is not None and last.cache is state and last.weights is weights  # looking at all modules is slow
        return goes_on or step_limit(model, len(input_ids)) is None

    def step(self, model: RoutedLM, weights: StepWeights, input_ids: Tensor, policy: RoutingPolicy) -> Tensor:
        """Logits [B,1,V] after a token of every row [B,1]."""
        assert self.state is not None
        last = self._decoder
        if last is None or last.cache is not self.state or last.weights is not weights:
            self._decoder = last = Decoder(model, policy, self.state, weights=weights)
        elif policy != self._policy:
            last.set_policy(policy)
        self._policy = policy
        return last.step(input_ids[:, 0]).clone()[:, None]

    def end(self, real: Tensor) -> None:
        """The call has read these columns, ``real`` bool [B,T] where they are no padding."""
        self.columns += real.shape[1]
        if self.record_past:
            self.recorded.append(real)

    def _record(self) -> None:
        assert self.state is not None
        self.state.record()
        self.recorded = []

    @property
    def batch_size(self) -> int:
        """Number of sequences (``AttributeError``: none yet, which transformers asks for with ``hasattr``)."""
        if self.state is None:
            raise AttributeError("the cache is empty")
        return len(self.state.lengths)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Not for models of other libraries."""
        raise NotImplementedError("natsl's cache holds states of natsl's models, not keys and values of others")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Not for models of other libraries."""
        raise NotImplementedError("natsl's cache holds states of natsl's models, not keys and values of others")

    def get_seq_length(self) -> int:
        """P."""
        return self.columns

    def get_max_length(self) -> int:
        """−1: there is no limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of a mask of ``query_length`` new tokens, and the first one of them."""
        return self.columns + query_length, 0

    def reset(self) -> None:
        """Forget all that was read."""
        self.state, self.columns, self.recorded, self._decoder = None, 0, [], None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with these rows; what they have read cannot be taken back."""
        if self.state is not None:
            self.state = self.state.select(beam_idx.tolist())
            self.recorded = []

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with these rows; what they have read cannot be taken back."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Go on with so many copies of each row; what they have read cannot be taken back."""
        if self.state is not None:
            self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def activate_past_recording(self) -> None:
        """Remember from the next call on what ``crop`` needs."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last −``tokens_to_remove`` columns back, and remember anew what is read from there on.

        Only columns that came since ``activate_past_recording`` and the last crop, and of a call with
        ``logits_to_keep`` maybe only the last so many. ``ValueError`` for more.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of tokens that are to go as a negative one")
        if self.state is None or self._model is None or self.state.recording is None:
            if tokens_to_remove:
                raise ValueError("the cache has nothing to go back to: call activate_past_recording() before it reads")
            return
        known = sum(real.shape[1] for real in self.recorded)
        if known + tokens_to_remove < 0:
            raise ValueError(f"crop({tokens_to_remove}): only the last {known} tokens can be taken back")
        if tokens_to_remove:
            lengths = self.state.lengths - torch.cat(self.recorded, 1)[:, tokens_to_remove:].sum(1)
            self.state.crop(lengths.tolist(), self._model)
            self.columns, self.recorded = self.columns + tokens_to_remove, []
        else:
            self._record()


class NatslCache(Cache):
    """What ``past_key_values`` or ``cache`` is for natsl's models; made by ``NatslForCausalLM.new_cache``."""

    def __init__(self) -> None:
        super().__init__(layers=[NatslLayer()])
        self._is_user_defined = False  # ``generate`` is to return it

    @property
    def layer(self) -> NatslLayer:
        """The one that holds everything."""
        layer = self.layers[0]
        assert isinstance(layer, NatslLayer)
        return layer


class NatslForCausalLM(PreTrainedModel, GenerationMixin):
    """``RoutedLM`` under the policy of its configuration.

    The attribute ``model`` is the ``RoutedLM``, ``config.policy`` its policy, which ``policy=`` of a call or of
    ``generate`` replaces. Trained on with ``labels``, its routers and what the policy does not use stay as they are;
    a budget then keeps another share than before, as the calibration is that of the export.
    """

    config: NatslConfig
    model: RoutedLM
    config_class = NatslConfig
    base_model_prefix = PREFIX.removesuffix(".")
    _keep_in_fp32_modules_strict = list(FLOAT32)  # noqa: RUF012
    _supports_sdpa = True  # the usual default; attention is natsl's own whatever is chosen

    def __init__(self, config: NatslConfig) -> None:
        super().__init__(config)
        self.model = RoutedLM(config.shape, config.calibration_points, config.precision)
        self.model.supernet_kinds = config.supernet_kinds
        self._steps: StepWeights | None = None
        self._freeze()
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_pretrained(  # type: ignore[no-untyped-def]
        cls, pretrained_model_name_or_path, *model_args: Any, **kwargs: Any
    ):
        """As of any model; of a folder made by natsl export, the files are compared with its manifest first.

        Raises ``ValueError`` for a file that has changed, weights that are missing or not finite, and a policy or a
        calibration table that does not fit.
        """
        folder = None if pretrained_model_name_or_path is None else Path(pretrained_model_name_or_path)
        faults = file_faults(folder) if folder is not None and (folder / "manifest.json").is_file() else []
        if faults:
            raise UserError(faults[0])
        wanted = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("use_safetensors", True)
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        model, info = loaded
        missing = sorted(info["missing_keys"])
        if missing:
            raise UserError(f"{pretrained_model_name_or_path} lacks weights of the model: {', '.join(missing)}")
        check_model(model.model, model.config.policy)
        model._freeze()  # loading has made new parameters
        return (model, info) if wanted else model

    def _freeze(self) -> None:
        """Let no optimiser change routers, which get no gradient here but weight decay, nor what the policy leaves."""
        self.model.freeze_unused(self.config.policy)
        for name, parameter in self.model.named_parameters():
            if ".router." in name:
                parameter.requires_grad_(False)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As of any model; ``ValueError`` for a folder made by natsl export, which this would make useless."""
        if (Path(save_directory) / "manifest.json").is_file():
            raise UserError(f"{save_directory} is an exported model with checksums: choose another folder")
        super().save_pretrained(save_directory, *args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        policy: RoutingPolicy | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the next tokens, and the loss if there are ``labels``.

        input_ids [B,T] int64; the id V, one past the vocabulary, is padding. ``attention_mask`` [B,T] or [B,P+T], 0 on
        padding, which may be on either side of a row, never between its tokens; what padding gets is unspecified.
        ``position_ids``: must be those that count each row's real tokens. ``past_key_values`` or ``cache``: what
        ``new_cache`` has made; it is updated. ``use_cache``: make one where there is none. ``labels`` [B,T]: as
        ``input_ids``, −100 where nothing is scored; the loss is the mean over the tokens that follow a real one.
        ``logits_to_keep``: the last so many columns, 0 all of them, or these columns. ``policy``: instead of the
        configuration's. Raises ``ValueError`` for what does not fit.
        """
        if past_key_values is not None and cache is not None:
            raise ValueError("past_key_values and cache are two names of one argument: give one of them")
        if self.model.calibration.levels.dtype is not torch.float64:
            raise ValueError(
                "what routes depend on has been rounded: load with from_pretrained(…, dtype=…), not .to(dtype)"
            )
        own = self._own_cache(past_key_values if cache is None else cache)
        if own is None and use_cache:
            own = self.new_cache()
        layer = None if own is None else own.layer
        state = None if layer is None else layer.begin(self.model, len(input_ids))
        wanted = logits_to_keep if isinstance(logits_to_keep, int) and labels is None else 0
        cut = input_ids.shape[1] - wanted
        if layer is not None and layer.record_past and wanted and cut > self.config.shape.chunk_size:
            # a prompt and candidates: what may be taken back begins with them, for else all would be read twice
            mask, positions = (None if x is None else x[:, :-wanted] for x in (attention_mask, position_ids))
            self.forward(input_ids[:, :cut], mask, positions, own, logits_to_keep=1, policy=policy)
            layer.crop(0)
            input_ids = input_ids[:, cut:]
            attention_mask = None if attention_mask is None else attention_mask[:, -wanted:]
        real = self._real(input_ids, attention_mask, 0 if layer is None else layer.columns)
        if position_ids is not None and (layer is None or not layer.columns):
            _check_positions(position_ids, input_ids, real)
        layout = None
        if real is not None:
            input_ids, layout = input_ids.masked_fill(~real, 0), Layout.padded(real)
        # natsl counts the last tokens from each row's last real one
        last = isinstance(logits_to_keep, int) and logits_to_keep > 0 and labels is None
        last = last and (real is None or bool(real[:, -1].all()))
        policy = self.config.policy if policy is None else policy
        if layer is not None and labels is None and real is None and layer.decodes(input_ids, self._steps):
            logits = layer.step(self.model, self._step_weights(), input_ids, policy)
        else:
            self._steps = None  # whoever trains or reads a prompt comes through here
            logits = self.model(
                input_ids,
                policy,
                layout=layout,
                cache=state,
                logits_to_keep=min(logits_to_keep, input_ids.shape[1]) if last else None,
            ).logits
        if layer is not None:
            layer.end(torch.ones_like(input_ids, dtype=torch.bool) if real is None else real)
        loss = None if labels is None else _loss(logits, labels, real)
        if isinstance(logits_to_keep, Tensor):
            logits = logits[:, logits_to_keep]
        elif logits_to_keep and not last:
            logits = logits[:, -logits_to_keep:]
        output = CausalLMOutputWithPast(loss=loss, logits=logits)
        if own is not None:
            output[_CACHE] = own
        return output.to_tuple() if return_dict is False else output

    def new_cache(self) -> NatslCache:
        """An empty cache, for ``past_key_values`` or ``cache`` of a call or of ``generate``."""
        return NatslCache()

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of embeddings."""
        return self.model.embed

    def get_output_embeddings(self) -> nn.Linear | None:
        """The output layer; None: it is the table of embeddings."""
        return self.model.head

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Refused: the vocabulary belongs to the shape of the model."""
        raise ValueError("the vocabulary of an exported model cannot be resized: train one with another vocab_size")

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: it keeps keys and values itself, which are only half of natsl's state."""
        raise ValueError("generate_batch is not supported: use generate, which takes batches of any lengths")

    def _init_weights(self, module: nn.Module) -> None:
        """``RoutedLM`` has initialised itself."""

    def _prepare_cache_for_generation(  # type: ignore[override]  # the library's returns None too
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation = {kind!r} is not supported: natsl's models have a cache of their own"
            )
        given = [model_kwargs.pop(name, None) for name in ("past_key_values", "cache")]
        if None not in given:
            raise ValueError("past_key_values and cache are two names of one argument: give one of them")
        cache = self._own_cache(given[0] or given[1])
        if cache is not None:
            cache._is_user_defined = True
        elif generation_config.use_cache is not False:
            cache = self.new_cache()
        if cache is not None:
            cache.layer.record_past = bool(generation_config.is_assistant)  # assisted decoding sets it itself
            model_kwargs[_CACHE] = cache
        if generation_config.is_assistant:
            model_kwargs.pop("policy", None)  # that of the model which it assists

    def _own_cache(self, cache: Any) -> NatslCache | None:
        """A cache of natsl's, in place of an empty one of another kind; ``ValueError`` for one that has read tokens."""
        if cache is None or isinstance(cache, NatslCache):
            return cache
        if isinstance(cache, Cache) and cache.get_seq_length() == 0:
            return self.new_cache()
        raise ValueError(f"the cache is a {type(cache).__name__} of another model: make one with model.new_cache()")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._steps = None  # else a copy would stay on a device that the model leaves
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_steps": None}

    def _step_weights(self) -> StepWeights:
        """Copies of the weights for steps of decoding, new ones after any call that is no step.

        And after a change that torch counts, which fused optimisers and ``.data`` do not.
        """
        if self._steps is None or not self._steps.are_current():
            self._steps = StepWeights(self.model)
        return self._steps

    def _real(self, input_ids: Tensor, attention_mask: Tensor | None, columns: int) -> Tensor | None:
        """Which tokens are no padding, bool [B,T]; None: all are. Waits for the device."""
        real = input_ids != self.config.vocab_size
        if attention_mask is not None:
            B, T = input_ids.shape
            if attention_mask.dim() != 2 or len(attention_mask) != B or attention_mask.shape[1] not in (T, columns + T):
                shape = tuple(attention_mask.shape)
                raise ValueError(
                    f"attention_mask is {shape}: it must be {(B, T)} or, with what was read, {(B, columns + T)}"
                )
            real = real & (attention_mask[:, -T:] > 0)
        return None if bool(real.all()) else real


def _check_positions(position_ids: Tensor, input_ids: Tensor, real: Tensor | None) -> None:
    expected = torch.ones_like(input_ids).cumsum(1) - 1 if real is None else real.long().cumsum(1) - 1
    wrong = position_ids.to(expected.device) != expected
    if bool((wrong if real is None else wrong & real).any()):
        raise ValueError(
            "position_ids must count the real tokens of each row from 0: several sequences in a row are not supported"
        )


def _loss(logits: Tensor, labels: Tensor, real: Tensor | None) -> Tensor:
    """Mean loss in nats, float32, of the labels that follow a real token."""
    targets = labels[:, 1:]
    if real is not None:
        targets = targets.masked_fill(~(real[:, 1:] & real[:, :-1]), -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten().to(logits.device))


def register() -> None:
    """Make ``AutoModelForCausalLM`` know it."""
    AutoModelForCausalLM.register(NatslConfig, NatslForCausalLM, exist_ok=True)


register()
