"""`ModelBase`: what a model can be asked and told, apart from files.

Names and meanings are those of `PreTrainedModel` of Transformers 4.57.6 (`modeling_utils.py`), so
that its `pipeline` and `Trainer`, accelerate and peft find what they look for. What does not apply
to an image model raises an error that says so.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from vit_common.checks import auto_class_name
from vit_common.config import ViTConfig, as_config
from vit_common.errors import InputError
from vit_common.parameters import Head
from vit_torch.attention import check_implementation
from vit_torch.layers import fill, initialize
from vit_torch.model import ViTLayer, ViTModule, ViTPart, ViTSelfAttention, options


class ModelBase(ViTPart):
    """Base of the models: parameters, dtypes, kernels, gradient checkpointing.

    A subclass with parts of its own builds them in its constructor and calls `post_init()` last.

    Args:
        config: sizes.
        attn_implementation: attention kernel, see `vit_torch.attention`; "auto" leaves it to
            `config._attn_implementation`.

    Attributes:
        config: the configuration given, or a copy of it if `attn_implementation` was given too.
        name_or_path: where the weights came from, or "".
        model_tags: tags for the model card, see `add_model_tags`; None without any.

    Example:
        >>> class Regressor(ViTPreTrainedModel):
        ...     def __init__(self, config):
        ...         super().__init__(config)
        ...         self.vit = ViTModel(config, add_pooling_layer=False)
        ...         self.regressor = nn.Linear(config.hidden_size, 1)
        ...         self.post_init()
    """

    config_class: ClassVar[type] = ViTConfig
    base_model_prefix: ClassVar[str] = "vit"
    main_input_name: ClassVar[str] = "pixel_values"
    head: ClassVar[Head | None] = None
    network_class: ClassVar[type] = ViTModule  # of the base network inside a model with a head

    # Read by Transformers, accelerate and peft.
    supports_gradient_checkpointing: ClassVar[bool] = True
    is_parallelizable: ClassVar[bool] = False
    _is_stateful: ClassVar[bool] = False
    _supports_sdpa: ClassVar[bool] = True
    _supports_flash_attn: ClassVar[bool] = False
    _supports_flash_attn_2: ClassVar[bool] = False
    _supports_flex_attn: ClassVar[bool] = False
    _supports_attention_backend: ClassVar[bool] = False
    _can_compile_fullgraph: ClassVar[bool] = True
    _can_record_outputs: ClassVar[dict[str, type]] = {
        "hidden_states": ViTLayer,
        "attentions": ViTSelfAttention,
    }
    _no_split_modules: list[str] = ["ViTEmbeddings", "ViTLayer"]  # noqa: RUF012 (as there)
    _skip_keys_device_placement: ClassVar[None] = None
    _keep_in_fp32_modules: ClassVar[None] = None
    _keep_in_fp32_modules_strict: ClassVar[None] = None
    _keys_to_ignore_on_load_missing: list[str] | None = None
    _keys_to_ignore_on_load_unexpected: list[str] | None = None
    _keys_to_ignore_on_save: list[str] | None = None
    _tied_weights_keys: ClassVar[None] = None
    _auto_class: str | None = None
    _tp_plan: ClassVar[None] = None
    _pp_plan: ClassVar[None] = None
    _hf_peft_config_loaded: ClassVar[bool] = False
    generation_config: ClassVar[None] = None
    model_tags: list[str] | None = None

    def __init__(
        self,
        config: ViTConfig,
        *inputs: Any,
        attn_implementation: str = "auto",
        **kwargs: Any,
    ) -> None:
        config = as_config(config, self.config_class)
        config.validate()
        if check_implementation(attn_implementation) != "auto":
            config = copy.copy(config)
            config._attn_implementation = attn_implementation
        elif config._attn_implementation is not None:
            check_implementation(config._attn_implementation)
        super().__init__(config=config, **kwargs)
        self.name_or_path = getattr(config, "name_or_path", "")
        self.warnings_issued: dict[str, Any] = {}

    def make_network(self, **kwargs: Any) -> Any:
        """The base network of a model with a head, of the family's own class."""
        return self.network_class(**options(self), **kwargs)

    # -- what the model is

    @property
    def framework(self) -> str:
        """ "pt"."""
        return "pt"

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the parameters: the first floating one."""
        floating = (p.dtype for p in self.parameters() if p.is_floating_point())
        return next(floating, torch.get_default_dtype())

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    @property
    def base_model(self) -> Any:
        """The network without its head."""
        return getattr(self, self.base_model_prefix, self)

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        """Inputs of the right shape, `pixel_values` (1, C, H, W), all zero."""
        size = (1, self.config.num_channels, *self.config.image_height_width)
        return {"pixel_values": torch.zeros(size, device=self.device)}

    @property
    def can_record_outputs(self) -> dict[str, type]:
        """The modules that hooks take hidden states and attention probabilities from."""
        return self._can_record_outputs

    @classmethod
    def can_generate(cls) -> bool:
        """False: there is no text to generate."""
        return False

    @classmethod
    def is_backend_compatible(cls) -> bool:
        """Whether any attention function of Transformers can be used: no."""
        return cls._supports_attention_backend

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters.

        Args:
            only_trainable: count those that require gradients.
            exclude_embeddings: leave out `nn.Embedding` tables, as Transformers does; the models
                here have none.
        """
        tables = {
            id(module.weight)
            for module in self.modules()
            if exclude_embeddings and isinstance(module, nn.Embedding)
        }
        return sum(
            p.numel()
            for p in self.parameters()
            if id(p) not in tables and (p.requires_grad or not only_trainable)
        )

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the parameters and, with `return_buffers`, of the buffers."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(t.numel() * t.element_size() for t in tensors)

    def estimate_tokens(self, input_dict: Mapping[str, Any]) -> int:
        """Number of values in `pixel_values`, or 0 without any."""
        pixels = input_dict.get(self.main_input_name)
        return 0 if pixels is None else pixels.numel()

    def floating_point_ops(
        self, input_dict: Mapping[str, Any], exclude_embeddings: bool = True
    ) -> int:
        """Transformers' estimate for its `Trainer`: 6 times pixels times parameters.

        It counts every pixel as a token, so it is far too high; `vit info` counts operations.
        """
        parameters = self.num_parameters(exclude_embeddings=exclude_embeddings)
        return 6 * self.estimate_tokens(input_dict) * parameters

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModel") -> None:
        """Record an Auto class's name in `_auto_class`. Nothing else follows: no code is written
        beside weights or run from there. `AutoModel.register` makes a class load through Auto.

        Raises:
            InputError: it is not an Auto class.
        """
        cls._auto_class = auto_class_name(auto_class)

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Add tags for the model card; those that are there already are left."""
        tags = [tags] if isinstance(tags, str) else tags
        known = self.model_tags or []
        self.model_tags = [*known, *dict.fromkeys(tag for tag in tags if tag not in known)]

    # -- parts

    def get_input_embeddings(self) -> nn.Module:
        """The patch projection."""
        return self.base_model.embeddings.patch_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the patch projection."""
        self.base_model.embeddings.patch_embeddings = value

    def get_output_embeddings(self) -> nn.Module | None:
        """None: no output is read through the input's embeddings."""
        return None

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Refused.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"{type(self).__name__} has no output embeddings; assign to the layer itself, as in "
            "`model.classifier = ...`."
        )

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any):
        """Refused: an image has no vocabulary.

        Raises:
            InputError: always, but where nothing is to change (None).
        """
        if new_num_tokens is None:
            return self.get_input_embeddings()
        raise InputError(
            f"{type(self).__name__} has no token embeddings to resize: images are cut into "
            "patches. For other image sizes pass `interpolate_pos_encoding=True` to the call."
        )

    def prune_heads(self, heads_to_prune: Mapping[int, Any]) -> None:
        """Refused: every block keeps its number of heads, so that weights fit their config.

        Raises:
            InputError: always, but where nothing is to be pruned.
        """
        if any(len(heads) for heads in heads_to_prune.values()):
            raise InputError(
                f"{type(self).__name__} does not prune heads; pass `head_mask` to the call, (L, A) "
                "with 0 for each head to leave out."
            )

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: no weights are tied."""

    # -- new weights

    @classmethod
    def _from_config(cls, config: ViTConfig, **kwargs: Any) -> Any:
        """A model with new weights.

        Args:
            config: sizes.
            **kwargs: `dtype` (or the older `torch_dtype`) of the parameters, by default the
                config's; `attn_implementation`; further arguments of the constructor.
        """
        dtype, older = kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None)
        dtype = next((d for d in (dtype, older, config.dtype) if d is not None), None)
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype.removeprefix("torch."), None)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise InputError(f"`dtype` must be a floating torch dtype; given {dtype!r}.")
        if "attn_implementation" in kwargs:  # a subclass's constructor need not take it
            config = copy.copy(config)
            kernel = kwargs.pop("attn_implementation")
            config._attn_implementation = None if kernel is None else check_implementation(kernel)
        model = cls(config, **kwargs)
        return model if dtype is None else model.to(dtype)

    @classmethod
    def from_config(cls, config: ViTConfig, **kwargs: Any) -> Any:
        """A model with new weights; see `_from_config`. `trust_remote_code` is accepted and has no
        effect."""
        kwargs.pop("trust_remote_code", None)
        return cls._from_config(config, **kwargs)

    def post_init(self) -> None:
        """Last line of a subclass's constructor: draws the weights of the parts it has added."""
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the weights of every module that has not been drawn yet."""
        for module in self.modules():
            if not getattr(module, "_is_hf_initialized", False):
                self._init_weights(module)
                module._is_hf_initialized = True  # type: ignore[assignment]
        self.tie_weights()

    initialize_weights = init_weights

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """New weights for one module, without those inside it: a truncated normal for matrices,
        ones for norms, zero for biases. `model.apply(model._init_weights)` draws a whole model."""
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            initialize(module.weight, self.config)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.LayerNorm):
            if module.elementwise_affine:
                module.weight.fill_(1.0)
                if module.bias is not None:
                    module.bias.zero_()
        elif isinstance(module, nn.GroupNorm):
            module.weight.fill_(1.0)
            module.bias.zero_()
        elif isinstance(module, nn.RMSNorm):
            module.weight.fill_(1.0)
        elif isinstance(module, ViTPart):
            for name, parameter in module.named_parameters(recurse=False):
                fill(parameter, name, self.config)

    # -- attention kernels

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def set_attn_implementation(self, attn_implementation: str | Mapping[str, str]) -> None:
        """Choose the attention kernel of every layer; see `vit_torch.attention`.

        Args:
            attn_implementation: name of the kernel; or, as Transformers' models of several parts
                take it, a mapping whose "" names that of the whole model.

        Raises:
            InputError: there is no such kernel.
        """
        if isinstance(attn_implementation, Mapping):
            attn_implementation = attn_implementation.get("", self.attn_implementation)
        check_implementation(attn_implementation)
        configs = {id(m.config): m.config for m in self.modules() if isinstance(m, ViTPart)}
        for config in configs.values():
            config._attn_implementation = attn_implementation

    # -- training

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Recompute each block in the backward pass instead of storing what is inside it.

        Args:
            gradient_checkpointing_kwargs: options of `torch.utils.checkpoint.checkpoint`;
                `use_reentrant` is False if not given.
        """
        given = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        for module in self._checkpointed():
            module.gradient_checkpointing = True
            module.gradient_checkpointing_kwargs = given

    def gradient_checkpointing_disable(self) -> None:
        """Undo `gradient_checkpointing_enable`."""
        for module in self._checkpointed():
            module.gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward pass."""
        return any(module.gradient_checkpointing for module in self._checkpointed())

    def _checkpointed(self) -> list[Any]:
        found = [m for m in self.modules() if hasattr(m, "gradient_checkpointing")]
        if not found:
            raise InputError(
                f"{type(self).__name__} has no encoder, so there is nothing to recompute in the "
                "backward pass."
            )
        return found

    def enable_input_require_grads(self) -> None:
        """Make the patch embeddings require gradients, for training adapters on frozen weights
        with gradient checkpointing."""

        def require(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            output.requires_grad_(True)

        self._require_grads_hook = self.get_input_embeddings().register_forward_hook(require)

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`."""
        if (hook := self.__dict__.pop("_require_grads_hook", None)) is not None:
            hook.remove()
