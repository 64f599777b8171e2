"""From canonical tensors to files: what `save_pretrained` of both twins does."""

from __future__ import annotations

import inspect
import math
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from vit_common.checks import check_keywords
from vit_common.config import CONFIG_NAME, ViTConfig
from vit_common.errors import CheckpointError, InputError, some
from vit_common.files.cards import CARD_NAME, ModelCard, rendered, write_card
from vit_common.files.checkpoint import make_directory, save_checkpoint
from vit_common.files.hub import PUSH_OPTIONS, push_if_asked
from vit_common.versions import PACKAGE
from vit_convert.formats import DESCRIBED, FILES, table_for
from vit_convert.rules import TensorLike, to_foreign

_SHOWN = 20  # classes in a model card
# Keywords of Transformers 4.57.6 without effect here: files are always written by this project and
# through a temporary folder.
_WITHOUT_EFFECT = ("save_function", "use_temp_dir", "variant", "save_peft_format")

SaveFormat = Literal["hub", "flax", "flax-safetensors"]


def save_parameters(
    directory: str | os.PathLike,
    config: ViTConfig,
    tensors: Mapping[str, TensorLike],
    *,
    to: SaveFormat = "hub",
    architecture: str,
    max_shard_size: int | str = "10GB",
    own: Iterable[str] = (),
) -> list[Path]:
    """Write weights and `config.json` into a directory; an earlier save survives a failure.

    After success nothing of an earlier save is left, in whichever of these formats it was.

    Args:
        directory: made if it is not there.
        config: written with `architecture` and the weights' dtype in it; left as it is.
        tensors: canonical name -> tensor, `vit.` prefix as the model has it.
        to: "hub" (model.safetensors in PyTorch's layout), "flax" (flax_model.msgpack) or
            "flax-safetensors" (model.safetensors in Flax's layout, as Transformers 4.57.6 wrote).
        architecture: class name for `architectures`.
        max_shard_size: largest file, in bytes or as "5GB".
        own: names of `tensors` that are of a subclass's own parts, written under the same names.

    Returns:
        The files written.

    Raises:
        InputError: no such format, or a bad size.
        MissingFileError: the directory or a file cannot be written.
    """
    if to not in DESCRIBED:
        raise InputError(f"`to` must be one of {', '.join(map(repr, DESCRIBED))}; given {to!r}.")
    files = FILES[to]
    own = frozenset(own)
    if own and to != "hub":
        raise InputError(
            f"{architecture} has parts of its own ({', '.join(sorted(own)[:4])}), which only "
            '`to="hub"` can hold.'
        )
    known = {name: tensor for name, tensor in tensors.items() if name not in own}
    mapped = to_foreign(known, table_for(to, config))
    mapped.tensors.update({name: tensors[name] for name in own})  # type: ignore[misc]
    if mapped.unused:
        raise CheckpointError(
            f"these parameters are not part of {architecture}: {', '.join(sorted(mapped.unused))}."
        )
    written = type(config).from_dict(config.to_dict())
    written.architectures = [architecture]
    written.dtype = next(iter(tensors.values())).dtype.name
    text = written.to_json_string()
    return save_checkpoint(
        make_directory(directory),
        mapped.tensors,
        container=files.container,
        stem=files.stem,
        max_shard_size=max_shard_size,
        metadata=files.metadata,
        separator="/",
        beside={CONFIG_NAME: text},
        # Weights of an earlier save in another format would be read instead of these, or beside
        # them, with a configuration that is no longer theirs.
        replaces=("model.safetensors", "flax_model.msgpack"),
    )


class Savable:
    """Saving and uploading, for the models of both twins: a model hands over its weights under
    their canonical names.

    Attributes:
        _saving_keywords: keywords of `push_to_hub` that are those of `save_pretrained`.
    """

    _saving_keywords: ClassVar[tuple[str, ...]] = ("max_shard_size", "safe_serialization", "to")

    config: Any
    model_tags: list[str] | None = None

    def _check_save_keywords(self, given: Iterable[str]) -> None:
        """Raise InputError if keywords of `save_pretrained` are nothing that it knows."""
        known = list(inspect.signature(self.save_pretrained).parameters)
        _check_keywords(f"{type(self).__name__}.save_pretrained", given, known)

    def _save(
        self,
        directory: str | os.PathLike,
        tensors: Mapping[str, TensorLike],
        *,
        to: SaveFormat,
        max_shard_size: int | str,
        upload: Mapping[str, Any],
        own: Iterable[str] = (),
    ) -> None:
        """Write the weights, `config.json` and, where there is none, a card; upload them where
        `push_to_hub` of `upload`, which holds the other keywords of `save_pretrained`, asks for it.
        `own` as `save_parameters`."""
        written = save_parameters(
            directory,
            self.config,
            tensors,
            to=to,
            architecture=type(self).__name__.removeprefix("Flax"),
            max_shard_size=max_shard_size,
            own=own,
        )
        directory, card = Path(directory), self._model_card()
        if not os.path.lexists(directory / CARD_NAME):
            write_card(directory / CARD_NAME, _titled(card, directory))
        # The card is not among the files: a repository keeps its own.
        names = [path.name for path in written]
        push_if_asked(directory, dict(upload), files=names, card=card)

    def _model_card(self, *, origin: bool = True) -> ModelCard:
        """The card of a repository or directory without one: architecture, sizes, classes, how to
        load it, and with `origin` where the weights were loaded from."""
        config, own_class = self.config, type(self)
        name = own_class.__name__.removeprefix("Flax")
        is_ours = self._is_ours
        # Transformers' `pipeline` refuses repositories that name another library.
        theirs = is_ours and not config.is_extended
        metadata = {"library_name": "transformers" if theirs else PACKAGE}
        if getattr(self, "head", None) in ("classifier", "teacher"):
            metadata["pipeline_tag"] = "image-classification"
        if "max_position_embeddings" in config.fields:
            inputs = f"texts of at most {config.max_position_embeddings} tokens"
        else:
            inputs = "images of {} x {} pixels".format(*config.image_height_width)
        text = (
            f"\n# {{repo}}\n\n`{name}` of the family `{config.model_type}`: "
            f"{config.num_hidden_layers} layers of hidden size {config.hidden_size}, {inputs}."
            f"\n{self._details()}"
        )
        place = getattr(self, "name_or_path", "") if origin else ""
        if place:
            here = os.path.exists(place)
            shown = Path(place).resolve().name if here else place  # nothing of this machine
            text += f"\nThe weights were loaded from `{shown}`; they may have been changed since.\n"
            if not here and re.fullmatch(r"[\w.-]+/[\w.-]+", place):
                metadata["base_model"] = place
        text += "\n## How to load it\n"
        if is_ours:
            text += "".join(
                f"\nWith {title}:\n\n```python\nfrom {package} import {prefix}{name}\n\n"
                f'model = {prefix}{name}.from_pretrained("{{repo}}")\n```\n'
                for title, package, prefix in (
                    ("JAX and Flax", "vit_flax", "Flax"),
                    ("PyTorch", "vit_torch", ""),
                )
            )
        else:  # a class of the user's own, which only they can say where to import from
            text += f'\n```python\nmodel = {own_class.__name__}.from_pretrained("{{repo}}")\n```\n'
        return ModelCard(metadata, text, tags=(PACKAGE,), added=self.model_tags or ())

    def _details(self) -> str:
        """The sizes and the classes of the network, as a list in Markdown."""
        config, head = self.config, getattr(self, "head", None)
        rows = [f"attention heads: {config.num_attention_heads}"]
        rows.append(f"width of the MLP: {config.intermediate_size}")
        if "max_position_embeddings" not in config.fields:
            rows.append("patches: {} x {} pixels".format(*config.patch_height_width))
        if self._is_ours:  # a class of the user's own may have parts that are not known here
            shapes = self._canonical_shapes()  # type: ignore[attr-defined]
            rows.append(f"parameters: {sum(map(math.prod, shapes.values())):,}")
        if head in ("classifier", "teacher"):
            labels = [str(label) for label in config.id2label.values()]
            if labels == [f"LABEL_{i}" for i in range(len(labels))]:
                rows.append(f"classes: {len(labels)}, without names")
            else:
                listed = some([f"`{' '.join(label.split())}`" for label in labels], _SHOWN)
                rows.append(f"classes: {len(labels)}: {listed}")
        return "\n" + "".join(f"- {row}\n" for row in rows)

    @property
    def _is_ours(self) -> bool:
        """Whether the class is one of this project."""
        return type(self).__module__.split(".")[0] in ("vit_flax", "vit_torch")

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Write `config.json`, the weights and, where there is none, a model card (README.md) into
        a directory."""
        raise NotImplementedError

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Save into a temporary directory and upload it to the Hub.

        A repository without a model card (README.md) gets one that says how to load the model. A
        card that is there stays; only tags given to `add_model_tags` are added to it.

        Args:
            repo_id: "owner/name"; made if it is not there.
            **kwargs: `token`, `private`, `commit_message`, `revision`, `create_pr` for the Hub;
                `max_shard_size`, `safe_serialization`, `to` (and in Flax `params`) as
                `save_pretrained`.

        Returns:
            The address of the upload.

        Raises:
            InputError: a keyword is not known. MissingFileError: the Hub refuses or cannot be
                reached.

        Example:
            >>> model.push_to_hub("me/my-vit", private=True)
        """
        saving = {name: kwargs.pop(name) for name in self._saving_keywords if name in kwargs}
        _check_keywords(f"{type(self).__name__}.push_to_hub", kwargs, self._saving_keywords)
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory, **saving)
            options = {**kwargs, "push_to_hub": True, "repo_id": repo_id}
            made, card = Path(directory) / CARD_NAME, self._model_card()
            ours = rendered(_titled(card, Path(directory)))
            if made.is_file() and made.read_text("utf-8") == ours:
                made.unlink()  # the repository may have one of its own; and it names the repository
            return str(push_if_asked(Path(directory), options, card=card))


def _titled(card: ModelCard, directory: Path) -> ModelCard:
    """A card of a directory, which has that one's name."""
    return card._replace(text=card.text.replace("{repo}", directory.resolve().name))


def _check_keywords(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise InputError unless each keyword is known, of the Hub, or without effect here."""
    check_keywords(what, given, [*known, *PUSH_OPTIONS, *_WITHOUT_EFFECT])
