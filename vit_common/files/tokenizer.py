"""Texts as token ids, by the tokenizer that lies beside a model."""

from __future__ import annotations

import json
import os
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vit_common.errors import ConfigError, InputError, MissingFileError, ViTError, shown
from vit_common.files.hub import ModelFiles
from vit_common.files.texts import read_json, reason

FAST, VOCABULARY, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
CONFIG, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"

# The words of CLIP's byte pair encoding, after `CLIPConverter` of `convert_slow_tokenizer.py` of
# Transformers 4.57.6; and the merges that OpenAI's `simple_tokenizer.py` takes of its file.
_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
_MERGES = slice(1, 49152 - 256 - 2 + 1)
_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"
_WORDS_ALONE = ("SiglipTokenizer", "SiglipTokenizerFast")


class Tokens(NamedTuple):
    """Texts of one batch.

    Attributes:
        input_ids: (B, S), int32.
        attention_mask: (B, S), int32: 0 where a text is padded.
        cut: indices of the texts that were too long, and lost their end.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    cut: tuple[int, ...]


class Tokenizer:
    """The tokenizer of a model, from its `tokenizer.json`; or from the `vocab.json` and
    `merges.txt` of CLIP, where only these are there.

    Args:
        name_or_path: folder, or name on the Hub; or the files of an opened model.
        **hub: as `vit_common.files.hub.ModelFiles`.

    Attributes:
        pad_id: what shorter texts are filled up with.
        name: where it comes from.

    Raises:
        MissingFileError: there are no such files, or they cannot be reached.
        ConfigError: they are none of a tokenizer.
        InputError: the package `tokenizers` is not installed.

    Example:
        >>> tokenizer = Tokenizer("openai/clip-vit-base-patch32")
        >>> tokenizer(["a cat", "a dog"], most=77).input_ids.shape
        (2, 4)
    """

    def __init__(self, name_or_path: str | os.PathLike | ModelFiles, **hub: Any) -> None:
        files: Any = name_or_path
        if not isinstance(name_or_path, ModelFiles):
            files = ModelFiles(name_or_path, **hub)
        self.name = str(files.name)
        try:
            import tokenizers
        except ImportError as error:
            raise InputError(
                "texts need the package tokenizers; run: pip install tokenizers (the extra `text`)"
            ) from error
        # A file of weights is not taken for its tokenizer: that lies beside it.
        local = files.local
        place = files if local is None or local.is_dir() else ModelFiles(local.parent)
        special = _special_tokens(place)
        table = _table(place, CONFIG)
        self._words_alone = table.get("tokenizer_class") in _WORDS_ALONE
        path = place.find(FAST)
        if path is not None:
            self._tokenizer = _read(path, tokenizers.Tokenizer.from_file, str(path))
        else:
            vocabulary, merges = place.find(VOCABULARY), place.find(MERGES)
            if vocabulary is None or merges is None:
                raise MissingFileError(
                    f"{self.name}: there is no {FAST} beside this model, and no {VOCABULARY} with "
                    f"{MERGES}, so texts cannot be turned into tokens. Give `tokenizer=` (in a "
                    "command, --tokenizer): a folder or a name on the Hub that has one, such as "
                    "openai/clip-vit-base-patch32."
                )
            self._tokenizer = _read(vocabulary, _of_clip, vocabulary, merges, special)
        # How texts are filled up and cut is said by the call, not by the file.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        pad = self._tokenizer.token_to_id(special["pad_token"])
        self.pad_id = 0 if pad is None else pad

    def __call__(self, texts: Sequence[str], *, most: int, to: int | None = None) -> Tokens:
        """The tokens of texts, with those that begin and end a text.

        Args:
            texts: any number, at least one.
            most: tokens that a text may have; of a longer one the end is cut off, before the token
                that ends it.
            to: tokens that each is filled up to; None is the longest of them.

        Raises:
            InputError: `texts` is no list of texts, or an empty one.
        """
        several = isinstance(texts, Sequence) and not isinstance(texts, (str, bytes))
        if not several or not all(isinstance(text, str) for text in texts):
            raise InputError(f"`texts` must be a list of texts; given {shown(texts)}.")
        if not len(texts):
            raise InputError("`texts` must hold at least one text; given none.")
        rows, cut = [], []
        if self._words_alone:
            texts = [_words(text) for text in texts]
        added = self._tokenizer.num_special_tokens_to_add(False)
        for i, text in enumerate(texts):
            ids = self._tokenizer.encode(text).ids
            if len(ids) > most:
                self._tokenizer.enable_truncation(max(most, added + 1))
                ids = self._tokenizer.encode(text).ids
                self._tokenizer.no_truncation()
                cut.append(i)
            rows.append(ids)
        length = max([to or 0, *map(len, rows)])
        input_ids = np.full((len(rows), length), self.pad_id, np.int32)
        mask = np.zeros((len(rows), length), np.int32)
        for i, ids in enumerate(rows):
            input_ids[i, : len(ids)] = ids
            mask[i, : len(ids)] = 1
        return Tokens(input_ids, mask, tuple(cut))


def _words(text: str) -> str:
    """A text in lower case, without punctuation and with single spaces, as SigLIP's are: its
    `tokenizer.json` leaves that to the code (`SiglipTokenizer` of Transformers 4.57.6)."""
    kept = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(kept.split())


def _table(files: ModelFiles, name: str) -> dict[str, Any]:
    """The mapping in a file; an empty one where there is no such file."""
    path = files.find(name)
    return {} if path is None else read_json(path)


def _special_tokens(files: ModelFiles) -> dict[str, str]:
    """The tokens that begin, end and fill up a text, as the files beside a tokenizer say."""
    found = {"bos_token": _BEGIN, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    for name in (SPECIAL, CONFIG):  # the latter is what Transformers reads first
        table = _table(files, name)
        for key in found:
            value = table.get(key)
            text = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(text, str):
                found[key] = text
    return found


def _read(path: Path, build: Any, *args: Any) -> Any:
    try:
        return build(*args)
    except ViTError:
        raise
    except Exception as error:  # of the package's Rust code: a bare Exception
        raise ConfigError(f"{path}: is no tokenizer ({reason(error)}).") from error


def _of_clip(vocabulary: Path, merges: Path, special: Mapping[str, str]) -> Any:
    """CLIP's byte pair encoding, as `CLIPTokenizerFast` makes it of the two files."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    words = read_json(vocabulary)
    lines = merges.read_text(encoding="utf-8").strip().split("\n")[_MERGES]
    pairs: list[Any] = [tuple(line.split()) for line in lines]
    missing = [text for text in dict.fromkeys(special.values()) if text not in words]
    if missing:
        raise ConfigError(
            f"{vocabulary}: has no token {', '.join(map(json.dumps, missing))}, which begins, ends "
            "or fills up a text."
        )
    made = Tokenizer(
        models.BPE(
            vocab=words,
            merges=pairs,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token=special["unk_token"],
        )
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    end, begin = special["eos_token"], special["bos_token"]
    made.post_processor = processors.RobertaProcessing(
        sep=(end, words[end]), cls=(begin, words[begin]), add_prefix_space=False, trim_offsets=False
    )
    made.add_special_tokens([*dict.fromkeys(special.values())])
    return made
