"""Model cards: the README.md of a Hub repository, with YAML front matter that the Hub reads."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vit_common.errors import warn
from vit_common.files.replace import write_text

CARD_NAME = "README.md"


class ModelCard(NamedTuple):
    """What the card of an uploaded model says.

    Attributes:
        metadata: front matter of a new card, without tags.
        text: body of a new card in Markdown; "{repo}" stands for the repository's name.
        tags: tags that a new card starts with.
        added: tags that are added to a new card and to one that is there already.
    """

    metadata: Mapping[str, Any]
    text: str
    tags: Sequence[str] = ()
    added: Sequence[str] = ()

    def to_upload(self, api: Any, repo: str, revision: str | None = None) -> bytes | None:
        """The card to upload, or None where the repository's own stays as it is.

        Only tags are ever added to a card that is there already.

        Args:
            api: `huggingface_hub.HfApi`, which asks the Hub.
            repo: "owner/name" of a repository that exists.
            revision: branch that is committed to.

        Warns:
            UserWarning: the front matter of the existing card cannot be read, so that tags cannot
                be added.

        Raises:
            Exception: whatever `huggingface_hub` raises where the Hub does not answer.
        """
        exists = api.file_exists(repo, CARD_NAME, revision=revision)
        if exists and not self.added:
            return None
        with tempfile.TemporaryDirectory() as directory:
            if not exists:
                path = Path(directory) / CARD_NAME
                return rendered(self._replace(text=self.text.replace("{repo}", repo))).encode()
            path = Path(
                api.hf_hub_download(repo, CARD_NAME, revision=revision, local_dir=directory)
            )
            return _with_tags(path, self.added, repo)


def write_card(path: str | os.PathLike, card: ModelCard) -> None:
    """Write a card into a file, in place of what there is; `{repo}` stays as it is.

    Raises:
        MissingFileError: it cannot be written.
    """
    write_text(path, rendered(card))


def rendered(card: ModelCard) -> str:
    """A new card as it is in a file: front matter in YAML, then the text.

    Not by huggingface_hub, whose import takes half a second, with every model that is saved.
    """
    tags = [*dict.fromkeys((*card.tags, *card.added))]
    lines = ["---"]
    for key, value in {**card.metadata, **({"tags": tags} if tags else {})}.items():
        if isinstance(value, str):
            lines.append(f"{key}: {_scalar(value)}")
        else:
            lines += [f"{key}:", *(f"- {_scalar(each)}" for each in value)]
    return "\n".join([*lines, "---", card.text])


_PLAIN = re.compile(r"[A-Za-z][\w./-]*", re.ASCII)
_NO_TEXT = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}


def _scalar(text: str) -> str:
    """A text in YAML, in quotes where it could be read as something else."""
    plain = _PLAIN.fullmatch(text) and text.lower() not in _NO_TEXT
    return text if plain else json.dumps(text)


def _with_tags(path: Path, added: Sequence[str], repo: str) -> bytes | None:
    """The card in a file with more tags; None if it has them all, or cannot be read."""
    from huggingface_hub import metadata_load

    try:
        metadata = metadata_load(path) or {}
        known = metadata.get("tags") or []
        known = [known] if isinstance(known, str) else list(known)
    except Exception as error:  # of the YAML parser: whatever people write there
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        warn(
            f"{repo}: the front matter of its {CARD_NAME} cannot be read ({why}), so no tags were "
            "added to it."
        )
        return None
    new = [tag for tag in dict.fromkeys(added) if tag not in known]
    if not new:
        return None
    _save(path, {**metadata, "tags": [*known, *new]})
    return path.read_bytes()


def _save(path: Path, metadata: Mapping[str, Any]) -> None:
    """Write front matter into a card, in place of what there is."""
    from huggingface_hub import metadata_save

    metadata_save(path, dict(metadata))
