"""CLIP: the network of `vit_torch.model` as its image tower, and its blocks as the text tower.

Names, calls and outputs are those of Transformers 4.57.6.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vit_common.checks import Interpolate, check_token_ids, check_tokens
from vit_common.config import ViTConfig
from vit_common.errors import InputError
from vit_common.families import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from vit_torch.arguments import check_tensors, has_values
from vit_torch.layers import dense, initialize, layer_norm
from vit_torch.model import (
    ViTEncoder,
    ViTForImageClassificationModule,
    ViTModule,
    add_network,
    finish,
    run_network,
)
from vit_torch.outputs import (
    BaseModelOutputWithPooling,
    CLIPOutput,
    CLIPTextModelOutput,
    CLIPVisionModelOutput,
)
from vit_torch.parts.part import ViTPart, options
from vit_torch.pretrained import ViTForImageClassification, ViTPreTrainedModel


class CLIPPreTrainedModel(ViTPreTrainedModel):
    """Base of CLIP's models; see `ViTPreTrainedModel`."""

    config_class = CLIPConfig
    base_model_prefix = "vision_model"
    network_class = ViTModule


class CLIPVisionModel(CLIPPreTrainedModel):
    """CLIP's image tower. The pooled output is the class token through the last norm, which
    `last_hidden_state` has not gone through.

    Args:
        config: sizes.
        add_pooling_layer: whether there is a pooled output.
        attn_implementation: see `vit_torch.attention`.
    """

    config_class = CLIPVisionConfig

    def __init__(
        self,
        config: CLIPVisionConfig,
        add_pooling_layer: bool = True,
        *,
        attn_implementation: str = "auto",
    ):
        super().__init__(config, attn_implementation=attn_implementation)
        self.add_pooling_layer = add_pooling_layer
        add_network(self, add_pooling_layer=add_pooling_layer)

    def forward(
        self,
        pixel_values=None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: Interpolate = None,
        return_dict: bool | None = None,
        *,
        head_mask=None,
    ):
        """Run the network; arguments as `ViTModel`.

        Returns:
            `BaseModelOutputWithPooling`, or its tuple with `return_dict=False`.

        Raises:
            InputError: an argument does not fit the model.
        """
        return self.vision_model(
            pixel_values,
            head_mask=head_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            interpolate_pos_encoding=interpolate_pos_encoding,
            return_dict=return_dict,
        )


class CLIPVisionModelWithProjection(CLIPPreTrainedModel):
    """CLIP's image tower with the projection of its pooled output to where images and texts are
    compared: `image_embeds`.

    Args:
        config: sizes.
        attn_implementation: see `vit_torch.attention`.
    """

    config_class = CLIPVisionConfig
    head = "projection"

    def __init__(self, config: CLIPVisionConfig, *, attn_implementation: str = "auto"):
        super().__init__(config, attn_implementation=attn_implementation)
        add_network(self, add_pooling_layer=True)
        self.visual_projection = dense(
            self, self.config.hidden_size, self.config.projection_dim, use_bias=False
        )

    def forward(
        self,
        pixel_values=None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: Interpolate = None,
        return_dict: bool | None = None,
        *,
        head_mask=None,
    ):
        """Run the network; arguments as `ViTModel`.

        Returns:
            `CLIPVisionModelOutput`, or its tuple with `return_dict=False`.

        Raises:
            InputError: an argument does not fit the model.
        """
        flags = self.config.resolve_flags(output_attentions, output_hidden_states, return_dict)
        outputs = run_network(
            self,
            flags,
            pixel_values,
            head_mask=head_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        return finish(
            CLIPVisionModelOutput,
            outputs,
            flags,
            image_embeds=self.visual_projection(outputs.pooler_output),
            last_hidden_state=outputs.last_hidden_state,
        )


class CLIPForImageClassification(CLIPPreTrainedModel, ViTForImageClassification):
    """CLIP's image tower with a linear classifier on the mean of the patches, which the last norm
    does not change; see `ViTForImageClassification`."""

    config_class = CLIPConfig

    def forward(
        self,
        pixel_values=None,
        labels=None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        head_mask=None,
        interpolate_pos_encoding: Interpolate = None,
    ):
        """Run the network; arguments as `ViTForImageClassification`, in the order of Transformers'
        class."""
        return ViTForImageClassificationModule.forward(
            self,
            pixel_values,
            head_mask=head_mask,
            labels=labels,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            interpolate_pos_encoding=interpolate_pos_encoding,
            return_dict=return_dict,
        )


# -- texts


class CLIPTextEmbeddings(ViTPart):
    """Token embeddings and position embeddings."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.token_embedding = self._table(self.config.vocab_size)
        self.position_embedding = self._table(self.config.max_position_embeddings)

    def _table(self, rows: int) -> nn.Embedding:
        table = nn.Embedding(rows, self.config.hidden_size)
        with torch.no_grad():
            initialize(table.weight, self.config)
        table._is_hf_initialized = True  # type: ignore[assignment]
        return table

    def forward(self, input_ids, position_ids=None):
        """(B, S), and (B, S) or None for 0, 1, ... -> (B, S, D)."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        return self.token_embedding(input_ids) + self.position_embedding(position_ids)


class CLIPTextNetwork(ViTPart):
    """The text tower: embeddings, the blocks of an image's network, in which a token attends to
    itself and those before it, and the last norm. The pooled output is that of the token that ends
    the text."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embeddings = CLIPTextEmbeddings(**options(self))
        self.encoder = ViTEncoder(**options(self))
        self.final_layernorm = layer_norm(self)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ):
        """Run the network.

        Args:
            input_ids: (B, S), ids of tokens.
            attention_mask: (B, S), 0 where no token attends to that one; None hides none.
            position_ids: (B, S); None means 0, 1, ....
            output_attentions, output_hidden_states, return_dict: None means the config's.

        Returns:
            `BaseModelOutputWithPooling`, or its tuple with `return_dict=False`.

        Raises:
            InputError: an argument does not fit the model.
        """
        check_tensors(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
        if input_ids is None:
            raise InputError("`input_ids` must be given: the ids of the tokens of texts.")
        check_tokens(tuple(input_ids.shape), self.config)
        for name, ids, count in (
            ("input_ids", input_ids, self.config.vocab_size),
            ("position_ids", position_ids, self.config.max_position_embeddings),
        ):
            if ids is not None and has_values(ids):
                check_token_ids(name, ids.cpu().numpy(), count)
        flags = self.config.resolve_flags(output_attentions, output_hidden_states, return_dict)
        hidden_states = self.embeddings(input_ids, position_ids)
        outputs = self.encoder(
            hidden_states,
            bias=self.mask(hidden_states, attention_mask),
            output_attentions=flags.output_attentions,
            output_hidden_states=flags.output_hidden_states,
        )
        last_hidden_state = self.final_layernorm(outputs.last_hidden_state)  # (B, S, D)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        return finish(
            BaseModelOutputWithPooling,
            outputs,
            flags,
            last_hidden_state=last_hidden_state,
            pooler_output=last_hidden_state[rows, last_tokens(input_ids, self.config)],
        )

    def mask(self, hidden_states, attention_mask=None):
        """What is added to the scores, (1 or B, 1, S, S): zero where a token attends to another."""
        tokens, dtype = hidden_states.shape[1], hidden_states.dtype
        attends = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=hidden_states.device)
        attends = attends.tril()
        if attention_mask is not None:
            attends = attends & (attention_mask[:, None, None, :] > 0)
        hidden = torch.zeros(attends.shape, dtype=dtype, device=hidden_states.device)
        return hidden.masked_fill(~attends, torch.finfo(dtype).min)


def last_tokens(input_ids, config: ViTConfig):
    """The place of the token that ends each text, (B, S) -> (B,).

    It is the first `eos_token_id`. Files of before 2023 say 2 there, whatever the vocabulary: with
    them it is the largest id, as OpenAI's own code has it.
    """
    ids = input_ids.int()
    if config.eos_token_id in (2, None):
        return ids.argmax(dim=-1)
    return (ids == config.eos_token_id).int().argmax(dim=-1)


class _TextModel(CLIPPreTrainedModel):
    """Base of the models of CLIP's text tower."""

    config_class = CLIPTextConfig
    base_model_prefix = "text_model"
    main_input_name = "input_ids"

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        """Inputs of the right shape, `input_ids` (1, 1)."""
        return {"input_ids": torch.zeros((1, 1), dtype=torch.long, device=self.device)}

    def get_input_embeddings(self) -> nn.Module:
        """The table of token embeddings."""
        return self.text_model.embeddings.token_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the table of token embeddings."""
        self.text_model.embeddings.token_embedding = value


class CLIPTextModel(_TextModel):
    """CLIP's text tower. The pooled output is that of the token that ends the text.

    Args:
        config: sizes.
        attn_implementation: see `vit_torch.attention`.
    """

    def __init__(self, config: CLIPTextConfig, *, attn_implementation: str = "auto"):
        super().__init__(config, attn_implementation=attn_implementation)
        self.text_model = CLIPTextNetwork(**options(self))

    def forward(self, *args: Any, **kwargs: Any):
        """Run the network; arguments, result and errors as `CLIPTextNetwork`."""
        return self.text_model(*args, **kwargs)


class CLIPTextModelWithProjection(_TextModel):
    """CLIP's text tower with the projection of its pooled output to where images and texts are
    compared: `text_embeds`.

    Args:
        config: sizes.
        attn_implementation: see `vit_torch.attention`.
    """

    head = "projection"

    def __init__(self, config: CLIPTextConfig, *, attn_implementation: str = "auto"):
        super().__init__(config, attn_implementation=attn_implementation)
        self.text_model = CLIPTextNetwork(**options(self))
        self.text_projection = dense(
            self, self.config.hidden_size, self.config.projection_dim, use_bias=False
        )

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ):
        """Run the network; arguments as `CLIPTextModel`.

        Returns:
            `CLIPTextModelOutput`, or its tuple with `return_dict=False`.

        Raises:
            InputError: an argument does not fit the model.
        """
        flags = self.config.resolve_flags(output_attentions, output_hidden_states, return_dict)
        outputs = self.text_model(
            input_ids,
            attention_mask,
            position_ids,
            flags.output_attentions,
            flags.output_hidden_states,
            True,
        )
        return finish(
            CLIPTextModelOutput,
            outputs,
            flags,
            text_embeds=self.text_projection(outputs.pooler_output),
            last_hidden_state=outputs.last_hidden_state,
        )


# -- both


class CLIPModel(CLIPPreTrainedModel):
    """A whole CLIP: how alike each image is to each text.

    Args:
        config: sizes of both towers.
        attn_implementation: see `vit_torch.attention`.

    Example:
        >>> model = CLIPModel.from_pretrained("openai/clip-vit-base-patch32")
        >>> output = model(**processor(text=["a cat", "a dog"], images=image, return_tensors="pt"))
        >>> output.logits_per_image.softmax(dim=1)
    """

    head = "towers"

    def __init__(self, config: CLIPConfig, *, attn_implementation: str = "auto"):
        super().__init__(config, attn_implementation=attn_implementation)
        config = self.config
        vision, text = (self._part(part) for part in (config.vision_config, config.text_config))
        self.vision_model = ViTModule(config=vision, add_pooling_layer=True)
        self.text_model = CLIPTextNetwork(config=text)
        P = config.projection_dim
        self.visual_projection = dense(self, vision.hidden_size, P, use_bias=False)
        self.text_projection = dense(self, text.hidden_size, P, use_bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))

    def _part(self, config: Any) -> Any:
        """A tower's configuration, with what the whole model's says of how it is run."""
        config = copy.copy(config)
        config._attn_implementation = self.config._attn_implementation
        config.gradient_checkpointing = self.config.gradient_checkpointing
        return config

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        position_ids=None,
        return_loss: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: Interpolate = None,
        return_dict: bool | None = None,
    ):
        """Run both towers.

        Args:
            input_ids, attention_mask, position_ids: as `CLIPTextModel`.
            pixel_values, interpolate_pos_encoding: as `ViTModel`.
            return_loss: whether `loss` is in the output: text i belongs to image i.
            output_attentions, output_hidden_states, return_dict: None means the config's.

        Returns:
            `CLIPOutput`, or its tuple with `return_dict=False`.

        Raises:
            InputError: an argument does not fit the model.
        """
        flags = self.config.resolve_flags(output_attentions, output_hidden_states, return_dict)
        vision = run_network(
            self, flags, pixel_values, interpolate_pos_encoding=interpolate_pos_encoding
        )
        text = self.text_model(
            input_ids,
            attention_mask,
            position_ids,
            flags.output_attentions,
            flags.output_hidden_states,
            True,
        )
        image_embeds = unit(self.visual_projection(vision.pooler_output))  # (images, P)
        text_embeds = unit(self.text_projection(text.pooler_output))  # (texts, P)
        logits_per_text = text_embeds @ image_embeds.t() * self.logit_scale.exp()
        output = CLIPOutput(
            loss=contrastive_loss(logits_per_text) if return_loss else None,
            logits_per_image=logits_per_text.t(),
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text,
            vision_model_output=vision,
        )
        return output if flags.return_dict else output.to_tuple()

    def get_text_features(self, input_ids, attention_mask=None, position_ids=None):
        """The projected pooled output of texts, (texts, projection_dim), not normalised."""
        outputs = self.text_model(input_ids, attention_mask, position_ids, return_dict=True)
        return self.text_projection(outputs.pooler_output)

    def get_image_features(self, pixel_values, interpolate_pos_encoding: Interpolate = None):
        """The projected pooled output of images, (images, projection_dim), not normalised."""
        outputs = self.vision_model(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True
        )
        return self.visual_projection(outputs.pooler_output)


def unit(embeds):
    """(B, P), each row divided by its length."""
    return embeds / embeds.pow(2).sum(dim=-1, keepdim=True).pow(0.5)


def contrastive_loss(logits_per_text):
    """The mean cross entropy of texts among images and of images among texts, where text i belongs
    to image i (Radford et al. 2021, figure 3): similarities (texts, images)."""
    if logits_per_text.shape[0] != logits_per_text.shape[1]:
        raise InputError(
            "`return_loss=True` needs one text for each image; given "
            f"{logits_per_text.shape[0]} texts and {logits_per_text.shape[1]} images."
        )
    logits = logits_per_text.to(torch.promote_types(logits_per_text.dtype, torch.float32))
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2
