"""Networks of images and texts: the network of `vit_flax.model` as image tower, its blocks as the
text tower, and both. CLIP and SigLIP are made of these.

`params` has Transformers' names; a tree of the names that all networks here have in common
(`network_params`) is taken everywhere too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from vit_common.checks import (
    Interpolate,
    check_beside_tokens,
    check_rank,
    check_token_ids,
    check_tokens,
)
from vit_common.config import ViTConfig
from vit_common.errors import InputError
from vit_flax.arguments import as_array, check_key, values_of
from vit_flax.cpu.half import traced_for
from vit_flax.int8 import SCALE, SUMS
from vit_flax.layers import dense, initializer, layer_norm
from vit_flax.model import (
    FlaxViTEncoder,
    FlaxViTForImageClassificationModule,
    FlaxViTModule,
    finish,
)
from vit_flax.outputs import FlaxBaseModelOutputWithPooling, FlaxCLIPOutput
from vit_flax.params import Params, Renaming, check_params
from vit_flax.parts.part import FlaxViTPart, options
from vit_flax.pretrained import FlaxViTPreTrainedModel
from vit_flax.stacked import flat_params, stack_layers

# -- modules


def named(part: FlaxViTPart, tower: type[FlaxViTPart], config: ViTConfig) -> Any:
    """The class of a tower's network, its parameters under Transformers' names.

    The lifted class renames the tree and nothing else. It takes trees of either names, and what it
    draws has Transformers'.
    """
    names = Renaming(config, None, under=(config.base_model_prefix,))

    def turn(rename: Callable, variables: Mapping[str, Any]) -> dict[str, Any]:
        params = variables.get("params")
        return {**variables, "params": rename(params)} if params else dict(variables)

    fresh = part.is_initializing()
    return nn.map_variables(
        tower,
        "params",
        partial(turn, names.ours),
        # What is drawn by a scan is in arrays of its own, which Transformers' tree has not.
        partial(turn, (lambda params: params) if part.scan_layers else names.theirs),
        init=fresh,
        mutable=fresh,
    )


def inside(part: FlaxViTPart, config: ViTConfig) -> dict[str, Any]:
    """Arguments of a tower in a model of two."""
    if config.gradient_checkpointing != part.config.gradient_checkpointing:
        config = copy.deepcopy(config)
        config.gradient_checkpointing = part.config.gradient_checkpointing
    return {**options(part), "config": config}


class FlaxImageTowerModule(FlaxViTPart):
    """An image tower; see `FlaxViTModule`."""

    add_pooling_layer: bool = True

    def setup(self):
        network = named(self, FlaxViTModule, self.config)
        self.vision_model = network(**options(self), add_pooling_layer=self.add_pooling_layer)

    def __call__(
        self,
        pixel_values,
        deterministic: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        head_mask=None,
        interpolate_pos_encoding: Interpolate = None,
    ):
        """Run the network; arguments as `FlaxViTModule`.

        Returns:
            `FlaxBaseModelOutputWithPooling`, or its tuple with `return_dict=False`.

        Raises:
            InputError: an argument does not fit the model.
        """
        return self.vision_model(
            pixel_values,
            deterministic,
            output_attentions,
            output_hidden_states,
            return_dict,
            head_mask=head_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )


class FlaxImageTowerClassifierModule(FlaxViTForImageClassificationModule):
    """An image tower and a linear classifier on the mean of the patches; see
    `FlaxViTForImageClassificationModule`."""

    def setup(self):
        network = named(self, FlaxViTModule, self.config)
        self.vision_model = network(**options(self), add_pooling_layer=True)
        self.classifier = dense(self, self.config.num_labels)


class FlaxTextEmbeddings(FlaxViTPart):
    """Token embeddings and position embeddings."""

    def setup(self):
        def table(rows: int) -> nn.Embed:
            return nn.Embed(
                rows,
                self.config.hidden_size,
                dtype=self.array_dtype,
                param_dtype=self.param_dtype,
                embedding_init=initializer(self.config.initializer_range),
            )

        self.token_embedding = table(self.config.vocab_size)
        self.position_embedding = table(self.config.max_position_embeddings)

    def __call__(self, input_ids, position_ids=None):
        """(B, S), and (B, S) or None for 0, 1, ... -> (B, S, D)."""
        if position_ids is None:
            position_ids = jnp.arange(input_ids.shape[1])[None]
        return self.token_embedding(input_ids) + self.position_embedding(position_ids)


class FlaxTextNetwork(FlaxViTPart):
    """A text tower: embeddings, the blocks of an image's network, and the last norm. Subclasses say
    which tokens a token attends to, and what stands for the text."""

    def setup(self):
        self.embeddings = FlaxTextEmbeddings(**options(self))
        self.encoder = FlaxViTEncoder(**options(self))
        self.final_layernorm = layer_norm(self)

    def __call__(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        deterministic: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ):
        """Run the network; arguments as `FlaxTextTowerModule`."""
        flags = self.config.resolve_flags(output_attentions, output_hidden_states, return_dict)
        check_tokens(input_ids.shape, self.config)
        input_ids = input_ids.astype(jnp.int32)
        outputs = self.encoder(
            self.embeddings(input_ids, position_ids),
            deterministic,
            bias=self.mask(input_ids.shape[1], attention_mask),
            output_attentions=flags.output_attentions,
            output_hidden_states=flags.output_hidden_states,
            grid=(1, input_ids.shape[1]),
        )
        last_hidden_state = self.final_layernorm(outputs.last_hidden_state)  # (B, S, D)
        return finish(
            FlaxBaseModelOutputWithPooling,
            self.rounded(outputs),
            flags,
            last_hidden_state=self.rounded(last_hidden_state),
            pooler_output=self.rounded(self.pool(last_hidden_state, input_ids)),
        )

    def pool(self, last_hidden_state, input_ids):
        """What stands for the text: (B, S, D) and (B, S) -> (B, width of the output)."""
        raise NotImplementedError

    def attends(self, tokens: int):
        """Which token attends to which, (1, 1, S, S) of truth values; None where all do to all."""
        return None

    def mask(self, tokens: int, attention_mask=None):
        """What is added to the scores, (1 or B, 1, S, S): zero where a token attends to another;
        None where all do to all."""
        attends = self.attends(tokens)
        if attention_mask is not None:
            given = attention_mask[:, None, None, :] > 0  # (B, 1, 1, S)
            given = jnp.broadcast_to(given, (len(given), 1, tokens, tokens))
            attends = given if attends is None else attends & given
        if attends is None:
            return None
        return jnp.where(attends, 0.0, jnp.finfo(self.array_dtype).min).astype(self.array_dtype)


class FlaxTextTowerModule(FlaxViTPart):
    """A text tower."""

    text_network = FlaxTextNetwork  # no field: the family's own

    def setup(self):
        self.text_model = named(self, self.text_network, self.config)(**options(self))

    def __call__(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        deterministic: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ):
        """Run the network.

        Args:
            input_ids: (B, S), ids of tokens.
            attention_mask: (B, S), 0 where no token attends to that one; None hides none.
            position_ids: (B, S); None means 0, 1, ....
            deterministic: no dropout.
            output_attentions, output_hidden_states, return_dict: None means the config's.

        Returns:
            `FlaxBaseModelOutputWithPooling`, or its tuple with `return_dict=False`.

        Raises:
            InputError: an argument does not fit the model.
        """
        return self.text_model(
            input_ids,
            attention_mask,
            position_ids,
            deterministic,
            output_attentions,
            output_hidden_states,
            return_dict,
        )


class FlaxTwoTowersModule(FlaxViTPart):
    """Both towers, and how alike each image is to each text."""

    text_network = FlaxTextNetwork  # no fields: the family's own
    output_class: ClassVar[Any] = FlaxCLIPOutput

    def setup(self):
        vision, text = self.config.vision_config, self.config.text_config
        self.vision_model = named(self, FlaxViTModule, vision)(**inside(self, vision))
        self.text_model = named(self, self.text_network, text)(**inside(self, text))

    def project_image(self, pooled):
        """Pooled outputs of images to where they are compared with texts, (images, P)."""
        return pooled

    def project_text(self, pooled):
        """Pooled outputs of texts to where they are compared with images, (texts, P)."""
        return pooled

    def scaled(self, product):
        """The logits (texts, images), of similarities."""
        raise NotImplementedError

    def loss(self, logits_per_text):
        """The loss of logits (texts, images), where text i belongs to image i."""
        raise NotImplementedError

    def __call__(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        position_ids=None,
        deterministic: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        return_loss: bool = False,
        interpolate_pos_encoding: Interpolate = None,
    ):
        """Run both towers.

        Args:
            input_ids, attention_mask, position_ids: as `FlaxTextTowerModule`.
            pixel_values, interpolate_pos_encoding: as `FlaxViTModule`.
            deterministic: no dropout.
            output_attentions, output_hidden_states, return_dict: None means the config's.
            return_loss: whether `loss` is in the output: text i belongs to image i.

        Returns:
            The family's output, as `FlaxCLIPOutput`, or its tuple with `return_dict=False`.

        Raises:
            InputError: an argument does not fit the model.
        """
        flags = self.config.resolve_flags(output_attentions, output_hidden_states, return_dict)
        both = (deterministic, flags.output_attentions, flags.output_hidden_states, True)
        vision = self.vision_model(
            pixel_values, *both, interpolate_pos_encoding=interpolate_pos_encoding
        )
        text = self.text_model(input_ids, attention_mask, position_ids, *both)
        image_embeds = unit(self.project_image(vision.pooler_output))  # (images, P)
        text_embeds = unit(self.project_text(text.pooler_output))  # (texts, P)
        product = jnp.matmul(text_embeds, image_embeds.T, precision=self.precision)
        logits_per_text = self.scaled(product)
        output = self.output_class(
            loss=self.loss(logits_per_text) if return_loss else None,
            logits_per_image=self.rounded(logits_per_text.T),
            logits_per_text=self.rounded(logits_per_text),
            text_embeds=self.rounded(text_embeds),
            image_embeds=self.rounded(image_embeds),
            text_model_output=text,
            vision_model_output=vision,
        )
        return output if flags.return_dict else output.to_tuple()

    def image_features(self, pixel_values, deterministic: bool = True, interpolate=None):
        """The projected pooled output of images, (images, P)."""
        outputs = self.vision_model(
            pixel_values, deterministic, return_dict=True, interpolate_pos_encoding=interpolate
        )
        return self.rounded(self.project_image(outputs.pooler_output))

    def text_features(self, input_ids, attention_mask, position_ids, deterministic: bool = True):
        """The projected pooled output of texts, (texts, P)."""
        outputs = self.text_model(
            input_ids, attention_mask, position_ids, deterministic, return_dict=True
        )
        return self.rounded(self.project_text(outputs.pooler_output))


def unit(embeds):
    """(B, P), each row divided by its length."""
    return embeds / jnp.linalg.norm(embeds, axis=-1, keepdims=True)


def check_pairs(logits_per_text) -> None:
    """Raise InputError unless there is one text for each image, (texts, images)."""
    if logits_per_text.shape[0] != logits_per_text.shape[1]:
        raise InputError(
            "`return_loss=True` needs one text for each image; given "
            f"{logits_per_text.shape[0]} texts and {logits_per_text.shape[1]} images."
        )


# -- models


class TransformersTree(FlaxViTPreTrainedModel):
    """A model whose `params` have Transformers' names."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_names"}

    def _is_custom(self) -> bool:
        """Whether the module is a subclass's own."""
        return not type(self._module).__module__.startswith("vit_flax.")

    @cached_property
    def _names(self) -> Renaming:
        return Renaming(self._config, self.head)

    def _shown(self, params: dict[str, Any]) -> dict[str, Any]:
        shown = self.scan_layers or self._is_custom()
        return params if shown else self._names.theirs(params)

    def _renamed(self, params: Any) -> Any:
        if not isinstance(params, Mapping) or self._is_custom():
            return params
        tree = self._names.ours(params)
        given, turned = (
            # What goes with an integer kernel is in no table.
            {path for path in flat if path[-1] not in (SCALE, SUMS)}
            for flat in (flat_params(params), flatten_dict(tree))
        )
        if self.scan_layers and turned != given and turned == self._single_shapes.keys():
            return stack_layers(tree)
        return tree


class ImageTowerModel(TransformersTree):
    """A model of an image tower."""

    def __call__(  # type: ignore[override]
        self,
        pixel_values: Any,
        params: Params | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        head_mask: Any = None,
        interpolate_pos_encoding: Interpolate = None,
    ) -> Any:
        """Run the network; arguments as `FlaxViTModel`.

        Returns:
            `FlaxBaseModelOutputWithPooling`, or its tuple with `return_dict=False`.

        Raises:
            InputError: an argument does not fit the model.
        """
        return self._call(
            pixel_values,
            params,
            dropout_rng,
            train,
            (output_attentions, output_hidden_states, return_dict),
            interpolate_pos_encoding,
            {"head_mask": head_mask},
        )


class WithText(TransformersTree):
    """A model that takes texts: what a call has in common with that of an image model is here."""

    main_input_name = "input_ids"

    @property
    def head_tokens(self) -> int | None:
        """None: the token that ends a text stands anywhere."""
        return None

    def _text_inputs(self, input_ids: Any, attention_mask: Any, position_ids: Any) -> dict:
        """The arrays of a call, checked: (B, S) each, or None."""
        config = getattr(self.config, "text_config", self.config)
        input_ids = as_array("input_ids", input_ids)
        check_tokens(input_ids.shape, config)
        check_token_ids("input_ids", values_of("input_ids", input_ids), config.vocab_size)
        arrays = {"input_ids": input_ids}
        given = {"attention_mask": attention_mask, "position_ids": position_ids}
        for name, value in given.items():
            arrays[name] = None if value is None else as_array(name, value)
            if value is not None:
                check_beside_tokens(input_ids.shape, **{name: arrays[name].shape})
        if position_ids is not None:
            values = values_of("position_ids", arrays["position_ids"])
            check_token_ids("position_ids", values, config.max_position_embeddings)
        return arrays

    def _run(
        self,
        arrays: Mapping[str, Any],
        params: Params | None,
        dropout_rng: jax.Array | None,
        train: bool,
        method: str = "__call__",
        **static: Any,
    ) -> Any:
        """A method of the module, jitted: once for each shape, dtype and value of `static`."""
        towers = [
            getattr(self.config, name, self.config) for name in ("vision_config", "text_config")
        ]
        rates = [each.attention_probs_dropout_prob for each in towers]
        rates += [rate for each in towers for rate in each.drop_path_rates]
        if train and max(rates) > 0.0 and dropout_rng is None:
            raise InputError("`train=True` with dropout needs `dropout_rng`, a JAX random key.")
        if dropout_rng is not None:
            check_key("dropout_rng", dropout_rng)
        return self._forward()(
            params or self.params,
            dict(arrays),
            dropout_rng if train else None,
            method,
            not train,
            tuple(static.items()),
            traced_for(),  # a program for another platform is traced anew
        )

    def _forward(self) -> Any:
        """The jitted methods of the module."""
        if "_jitted" not in vars(self):
            module, shapes, renamed = self._module, self._shapes, self._renamed

            def run(params, arrays, dropout_rng, method, deterministic, static, _):
                return module.apply(
                    {"params": check_params(renamed(params), shapes)},
                    **arrays,
                    deterministic=deterministic,
                    **dict(static),
                    rngs=None if dropout_rng is None else {"dropout": dropout_rng},
                    method=method,
                )

            self._jitted = jax.jit(run, static_argnums=(3, 4, 5, 6))
        return self._jitted


class TextTowerModel(WithText):
    """A model of a text tower. `input_shape` is (batch, tokens)."""

    base_model_prefix = "text_model"

    def _checked_input_shape(self, input_shape: Any) -> tuple[Any, ...]:
        shape = (1, 1) if input_shape is None else tuple(input_shape)
        check_tokens(shape, self._config)
        return shape

    def __call__(  # type: ignore[override]
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Params | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Run the network.

        Args:
            input_ids: (B, S), ids of tokens.
            attention_mask: (B, S), 0 where no token attends to that one; None hides none.
            position_ids: (B, S); None means 0, 1, ....
            params, dropout_rng, train, output_attentions, output_hidden_states, return_dict: as
                `FlaxViTModel`.

        Returns:
            `FlaxBaseModelOutputWithPooling`, of a model with a projection
            `FlaxCLIPTextModelOutput`; or its tuple with `return_dict=False`.

        Raises:
            InputError: an argument does not fit the model.
        """
        flags = self.config.resolve_flags(output_attentions, output_hidden_states, return_dict)
        arrays = self._text_inputs(input_ids, attention_mask, position_ids)
        return self._run(arrays, params, dropout_rng, train, **flags._asdict())


class TwoTowersBase(WithText):
    """Base of the models of both towers; see `FlaxViTPreTrainedModel`. `input_shape` is a pair:
    (batch, tokens) and (batch, height, width, channels)."""

    base_model_prefix = "vision_model"

    def _checked_input_shape(self, input_shape: Any) -> tuple[Any, ...]:
        text, image = (None, None) if input_shape is None else input_shape
        text = (1, 1) if text is None else tuple(text)
        check_tokens(text, self._config.text_config)
        return text, super()._checked_input_shape(image)


class TwoTowersModel(TwoTowersBase):
    """A model of both towers: how alike each image is to each text."""

    head = "towers"

    def __call__(  # type: ignore[override]
        self,
        input_ids: Any,
        pixel_values: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Params | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        return_loss: bool = False,
        interpolate_pos_encoding: Interpolate = None,
    ) -> Any:
        """Run both towers.

        Args:
            input_ids, attention_mask, position_ids: as those of the model of the text tower.
            pixel_values, interpolate_pos_encoding: as `FlaxViTModel`.
            params, dropout_rng, train, output_attentions, output_hidden_states, return_dict: as
                `FlaxViTModel`.
            return_loss: whether `loss` is in the output: text i belongs to image i.

        Returns:
            `FlaxCLIPOutput`, or its tuple with `return_dict=False`.

        Raises:
            InputError: an argument does not fit the model.
        """
        flags = self.config.resolve_flags(output_attentions, output_hidden_states, return_dict)
        arrays = self._text_inputs(input_ids, attention_mask, position_ids)
        arrays["pixel_values"] = channels_last(pixel_values)
        return self._run(
            arrays,
            params,
            dropout_rng,
            train,
            **flags._asdict(),
            return_loss=bool(return_loss),
            interpolate_pos_encoding=interpolate_pos_encoding or False,
        )

    def get_text_features(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Params | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """The projected pooled output of texts, (texts, projection_dim), not normalised; arguments
        as a call's."""
        arrays = self._text_inputs(input_ids, attention_mask, position_ids)
        return self._run(arrays, params, dropout_rng, train, "text_features")

    def get_image_features(
        self,
        pixel_values: Any,
        params: Params | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        *,
        interpolate_pos_encoding: Interpolate = None,
    ) -> jax.Array:
        """The projected pooled output of images, (images, projection_dim), not normalised;
        arguments as a call's."""
        arrays = {"pixel_values": channels_last(pixel_values)}
        size = interpolate_pos_encoding or False
        return self._run(arrays, params, dropout_rng, train, "image_features", interpolate=size)


def channels_last(pixel_values: Any) -> jax.Array:
    """Images (B, C, H, W) as modules take them, (B, H, W, C)."""
    pixel_values = as_array("pixel_values", pixel_values)
    check_rank(pixel_values, "(batch, channels, height, width)")
    return pixel_values.transpose(0, 2, 3, 1)
