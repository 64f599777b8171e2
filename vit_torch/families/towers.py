"""Networks of images and texts: the network of `vit_torch.model` as image tower, its blocks as the
text tower, and both. CLIP and SigLIP are made of these.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import nn

from vit_common.checks import Interpolate, check_beside_tokens, check_token_ids, check_tokens
from vit_common.config import ViTConfig
from vit_common.errors import InputError
from vit_torch.arguments import check_tensors, has_values
from vit_torch.layers import initialize, layer_norm
from vit_torch.model import (
    ViTEncoder,
    ViTForImageClassificationModule,
    ViTModule,
    add_network,
    finish,
    run_network,
)
from vit_torch.outputs import BaseModelOutputWithPooling, CLIPOutput
from vit_torch.parts.part import ViTPart, options
from vit_torch.pretrained import ViTForImageClassification, ViTPreTrainedModel


class ImageTower(ViTPreTrainedModel):
    """An image tower.

    Args:
        config: sizes.
        add_pooling_layer: whether there is a pooled output.
        attn_implementation: see `vit_torch.attention`.
    """

    def __init__(
        self,
        config: ViTConfig,
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
        return self.vision_model(  # type: ignore[operator]
            pixel_values,
            head_mask=head_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            interpolate_pos_encoding=interpolate_pos_encoding,
            return_dict=return_dict,
        )


class ImageTowerClassifier(ViTForImageClassification):
    """An image tower with a linear classifier on the mean of the patches; see
    `ViTForImageClassification`."""

    def forward(  # type: ignore[override]
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


class TextEmbeddings(ViTPart):
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


class TextNetwork(ViTPart):
    """A text tower: embeddings, the blocks of an image's network, and the last norm. Subclasses say
    which tokens a token attends to, and what stands for the text."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embeddings = TextEmbeddings(**options(self))
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
        for name, beside in (("attention_mask", attention_mask), ("position_ids", position_ids)):
            if beside is not None:
                check_beside_tokens(tuple(input_ids.shape), **{name: tuple(beside.shape)})
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
            grid=(1, input_ids.shape[1]),
        )
        last_hidden_state = self.final_layernorm(outputs.last_hidden_state)  # (B, S, D)
        return finish(
            BaseModelOutputWithPooling,
            outputs,
            flags,
            last_hidden_state=last_hidden_state,
            pooler_output=self.pool(last_hidden_state, input_ids),
        )

    def pool(self, last_hidden_state, input_ids):
        """What stands for the text: (B, S, D) and (B, S) -> (B, width of the output)."""
        raise NotImplementedError

    def attends(self, hidden_states):
        """Which token attends to which, (1, 1, S, S) of truth values; None where all do to all."""
        return None

    def mask(self, hidden_states, attention_mask=None):
        """What is added to the scores, (1 or B, 1, S, S): zero where a token attends to another;
        None where all do to all."""
        tokens, dtype = hidden_states.shape[1], hidden_states.dtype
        attends = self.attends(hidden_states)
        if attention_mask is not None:
            given = attention_mask[:, None, None, :] > 0  # (B, 1, 1, S)
            given = given.expand(-1, -1, tokens, -1)
            attends = given if attends is None else attends & given
        if attends is None:
            return None
        hidden = torch.zeros(attends.shape, dtype=dtype, device=hidden_states.device)
        return hidden.masked_fill(~attends, torch.finfo(dtype).min)


class TextTowerBase(ViTPreTrainedModel):
    """Base of the models of a text tower."""

    base_model_prefix = "text_model"
    main_input_name = "input_ids"

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        """Inputs of the right shape, `input_ids` (1, 1)."""
        return {"input_ids": torch.zeros((1, 1), dtype=torch.long, device=self.device)}

    def get_input_embeddings(self) -> nn.Module:
        """The table of token embeddings."""
        return self.text_model.embeddings.token_embedding  # type: ignore[union-attr, return-value]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the table of token embeddings."""
        self.text_model.embeddings.token_embedding = value  # type: ignore[union-attr]


class TextTower(TextTowerBase):
    """A text tower.

    Args:
        config: sizes.
        attn_implementation: see `vit_torch.attention`.
    """

    text_network: ClassVar[type[TextNetwork]]

    def __init__(self, config: ViTConfig, *, attn_implementation: str = "auto"):
        super().__init__(config, attn_implementation=attn_implementation)
        self.text_model = self.text_network(**options(self))

    def forward(self, *args: Any, **kwargs: Any):
        """Run the network; arguments, result and errors as `TextNetwork`."""
        return self.text_model(*args, **kwargs)


class TwoTowers(ViTPreTrainedModel):
    """Both towers: how alike each image is to each text.

    Args:
        config: sizes of both towers.
        attn_implementation: see `vit_torch.attention`.
    """

    head = "towers"
    text_network: ClassVar[type[TextNetwork]]
    output_class: ClassVar[type[CLIPOutput]]

    def __init__(self, config: Any, *, attn_implementation: str = "auto"):
        super().__init__(config, attn_implementation=attn_implementation)
        config = self.config
        vision, text = (self._part(part) for part in (config.vision_config, config.text_config))
        self.vision_model = ViTModule(config=vision, add_pooling_layer=True)
        self.text_model = self.text_network(config=text)

    def _part(self, config: Any) -> Any:
        """A tower's configuration, with what the whole model's says of how it is run."""
        config = copy.copy(config)
        config._attn_implementation = self.config._attn_implementation
        config.gradient_checkpointing = self.config.gradient_checkpointing
        return config

    def project_image(self, pooled):
        """Pooled outputs of images to where they are compared with texts, (images, P)."""
        return pooled

    def project_text(self, pooled):
        """Pooled outputs of texts to where they are compared with images, (texts, P)."""
        return pooled

    def scaled(self, product):
        """The logits (texts, images), of similarities."""
        raise NotImplementedError

    def contrast(self, logits_per_text):
        """The loss of logits (texts, images), where text i belongs to image i."""
        raise NotImplementedError

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
            input_ids, attention_mask, position_ids: as `TextNetwork`.
            pixel_values, interpolate_pos_encoding: as `ViTModel`.
            return_loss: whether `loss` is in the output: text i belongs to image i.
            output_attentions, output_hidden_states, return_dict: None means the config's.

        Returns:
            The family's output, as `CLIPOutput`, or its tuple with `return_dict=False`.

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
        image_embeds = unit(self.project_image(vision.pooler_output))  # (images, P)
        text_embeds = unit(self.project_text(text.pooler_output))  # (texts, P)
        logits_per_text = self.scaled(text_embeds @ image_embeds.t())
        output = self.output_class(
            loss=self.contrast(logits_per_text) if return_loss else None,
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
        return self.project_text(outputs.pooler_output)

    def get_image_features(self, pixel_values, interpolate_pos_encoding: Interpolate = None):
        """The projected pooled output of images, (images, projection_dim), not normalised."""
        outputs = self.vision_model(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True
        )
        return self.project_image(outputs.pooler_output)


def unit(embeds):
    """(B, P), each row divided by its length."""
    return embeds / embeds.pow(2).sum(dim=-1, keepdim=True).pow(0.5)


def check_pairs(logits_per_text) -> None:
    """Raise InputError unless there is one text for each image, (texts, images)."""
    if logits_per_text.shape[0] != logits_per_text.shape[1]:
        raise InputError(
            "`return_loss=True` needs one text for each image; given "
            f"{logits_per_text.shape[0]} texts and {logits_per_text.shape[1]} images."
        )
