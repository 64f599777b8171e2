"""Which format is this? Decided by the names and shapes of the whole file, never by one key."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from vit_common.errors import CheckpointError, InputError, some
from vit_convert.formats import FORMATS, NAMES
from vit_convert.formats.format import PREFIXES, Format, Found
from vit_convert.rules import TensorLike

_CANONICAL = "embeddings.patch_embeddings.projection.weight"
_TEXT = "text_model.embeddings.token_embedding.weight"
# What the patch projection's kernel is called, in any of the formats. What stands before it is what
# the file puts before every name of the network.


def _names_of(canonical: str) -> dict[str, bool]:
    """What a parameter is called, in any of the formats, and whether in one of them what a family
    puts before its names may stand before it."""
    return {
        name: any(t.prefixed for t in FORMATS if t.rule_for_foreign(name))
        for table in FORMATS
        if (hit := table.rule_for_canonical(canonical)) is not None
        for name in hit[0].foreign_names
    }


def _last(names: Iterable[str]) -> re.Pattern[str]:
    """What a name in a file ends with, where it is one of these."""
    return re.compile(rf"(?:^|(?<=[/.]))(?:{'|'.join(map(re.escape, sorted(names)))})$")


_PROJECTIONS = _names_of(_CANONICAL)
_PROJECTION = _last(_PROJECTIONS)
_TEXTS = _names_of(_TEXT)  # of text towers by themselves
_TOKENS = _last(_TEXTS)
_REFUSED = tuple(dict.fromkeys(row for table in FORMATS for row in table.refuses))

# Places where a file can have the network, the preferred one first: before all of them, the top;
# DINO publishes its teacher. "0/" is the first of what a training of Google's saves as a tuple.
_COPIES = (
    r"(model|state_dict|model_state_dict|net|network|module)[/.]",
    r"(params|opt/target|optimizer/target|target|0)/",
    r"teacher[/.]",
    r"(model_ema|ema|state_dict_ema|ema_state_dict|ema_params)[/.]",
    r"student[/.]",
)
_MOMENTUM = r"(.*[/.])?(momentum_encoder|momentum_backbone|encoder_k)[/.].*"
# Names between those places and the network's own.
_INNER = (
    r"((module|backbone|_orig_mod|encoder|img|visual|model|base_encoder|timm_model|net|network|"
    rf"{'|'.join(PREFIXES)})[/.])*"
)
_ELSEWHERE = (
    (
        r"(.*[/.])?(opt|optim|optimi[sz]ers?|opt_state|optimizer_states|state|lr_schedulers?|"
        r"(grad_|amp_)?scaler)[/.].*",
        "state of the optimizer",
    ),
    (
        r"(.*[/.])?(model_ema|ema|state_dict_ema|ema_state_dict|ema_params)[/.].*",
        "an average of the weights over training; the weights themselves are taken",
    ),
    (r"student[/.].*", "the student of DINO's training; the teacher is taken"),
    (_MOMENTUM, "the momentum copy of a pretraining; the base encoder is taken"),
    (r"(.*[/.])?(criterion|loss|loss_fn|loss_func)[/.].*", "of the loss of a training"),
    (r"(callbacks|loops|hyper_parameters|rng_state|args|config)[/.].*", "of a training's progress"),
    (r"(.*[/.])?(t|txt|text|contrastive)[/.].*", "of a text tower"),
    (r"(.*[/.])?(epoch|step|steps|iteration|global_step|count)", "a counter of training"),
)
# (what else is in the file, names that then are not the network's, why): a classifier of one's own
# can have such a name too.
_THEN_ELSEWHERE = (
    (r"0/.*", r"1/.*", "state of the optimizer"),
    (r"0/.*", r"2", "a counter of training"),
    (
        r"(.*[/.])?(base_encoder|momentum_encoder|momentum_backbone|encoder_k)[/.].*",
        r"(.*[/.])?(predictor|queue|queue_ptr)([/.].*)?",
        "a predictor or queue of pretraining",
    ),
    (
        r"(.*[/.])?(dino_head|ibot_head|last_layer\d?)[/.].*",
        r"(.*[/.])?(dino_loss|dino_head|ibot_head|head[/.](mlp|last_layer|last_norm)\d?)[/.].*",
        "a head or loss of pretraining",
    ),
)

_HEAD_BESIDE = re.compile(
    r"(.*?)((?:head|head_dist|fc_norm)\.(?:weight|bias)|layers/dense(?:_1)?/vars/[01])"
)


@dataclass(frozen=True)
class Root:
    """Where in a file the network lies.

    Attributes:
        path: what stands before every name of the network ("", "model/", "teacher/backbone.", ...);
            without the prefix of a family.
        keys: name without it -> name as the file has it.
        ignored: name as the file has it -> why it is left aside.
        beside: names as the file has them that lie outside, and that nothing explains.
    """

    path: str
    keys: dict[str, str]
    ignored: dict[str, str] = field(default_factory=dict)
    beside: list[str] = field(default_factory=list)


def find_root(tensors: Mapping[str, TensorLike] | Iterable[str]) -> Root:
    """Find the network in a file that may hold more: training states, copies, prefixes.

    Args:
        tensors: the tensors by name, or their names alone.

    Raises:
        CheckpointError: there is no network, or there are several and nothing says which is meant.
    """
    keys = list(tensors)
    roots: dict[str, str] = {}  # path -> path with the prefix of a family
    for pattern, names in ((_PROJECTION, _PROJECTIONS), (_TOKENS, _TEXTS)):
        for key in keys:
            if match := pattern.search(key):
                before = key[: match.start()]
                # Only some formats put the family there by themselves.
                roots[_without_family(before) if names[match[0]] else before] = before
        if roots:
            break
    if not roots:
        raise CheckpointError(_not_a_network(keys))
    ranked = sorted(roots, key=lambda path: (_rank(path), len(path)))
    path = ranked[0]
    ties = [other for other in ranked[1:] if _rank(other) == _rank(path)]
    # Moments of an optimizer lie deeper than the weights they belong to.
    ties = [other for other in ties if not re.fullmatch(_ELSEWHERE[0][0], other)]
    if ties:
        raise CheckpointError(
            f"the file holds several networks, under {', '.join(map(repr, (path, *ties)))}; save "
            "the one you mean in a file of its own."
        )
    inside = {key[len(path) :]: key for key in keys if key.startswith(path)}
    more = tuple(
        (pattern, why)
        for sign, pattern, why in _THEN_ELSEWHERE
        if any(re.fullmatch(sign, key) for key in keys)
    )
    ignored, beside = {}, []
    for key in keys:
        if key.startswith(path):
            continue
        head = _HEAD_BESIDE.fullmatch(key)
        if head and path.startswith(head[1]):
            inside[head[2]] = key  # a classifier beside the backbone it stands on
        elif why := _reason(key, more):
            ignored[key] = why
        elif isinstance(tensors, Mapping) and _is_number(tensors[key]):
            ignored[key] = f"outside {path!r}, where the network is"
        else:
            beside.append(key)
    if path == "":
        # Without anything before the network's names, what lies deeper may still be another's.
        for bare in list(inside):
            others = [other for other in roots if other and bare.startswith(other)]
            reason = _reason(bare) if others or "/opt" in f"/{bare}" else None
            if reason:
                ignored[inside.pop(bare)] = reason
    return Root(path, inside, ignored, beside)


def _without_family(path: str) -> str:
    match = re.search(rf"(?:^|(?<=[/.]))(?:{'|'.join(PREFIXES)})[/.]$", path)
    return path[: match.start()] if match else path


def _rank(path: str) -> int:
    """Place of a path in `_COPIES`, whatever stands between ("module.", "backbone.", "img/")."""
    if re.fullmatch(_MOMENTUM, path):
        return len(_COPIES) + 2
    for rank, pattern in enumerate(_COPIES, 1):
        if re.match(pattern, path):
            return rank
    return 0 if re.fullmatch(_INNER, path) else len(_COPIES) + 1


def _reason(key: str, more: tuple[tuple[str, str], ...] = ()) -> str | None:
    rows = (*more, *_ELSEWHERE)
    return next((why for pattern, why in rows if re.fullmatch(pattern, key)), None)


def _is_number(tensor: TensorLike) -> bool:
    """Whether it is one number, or holds integers: no weight, whatever it is."""
    return math.prod(tensor.shape) <= 1 or tensor.dtype.kind in "iub"


def _not_a_network(keys: list[str]) -> str:
    for pattern, what in _REFUSED:
        if any(re.search(rf"(?:^|[/.]){pattern}$", key) for key in keys):
            return f"this network has {what}, which no model here has."
    first = ", ".join(map(repr, sorted(keys)[:4])) or "no keys"
    known = "; ".join(dict.fromkeys(f"{t.name}: {t.describes}" for t in FORMATS))
    return (
        "these are not the weights of a Vision Transformer in a known format: the first of "
        f"{len(keys)} names are {first}. Known formats: {known}."
    )


def detect_format(
    keys: Iterable[str],
    *,
    name: str | None = None,
    hints: Mapping[str, str] | None = None,
    shapes: Mapping[str, TensorLike] | None = None,
    also: Iterable[str] = (),
) -> Format:
    """The one table that knows the keys of a network.

    Args:
        keys: names without what `find_root` found before them.
        name: the format, where the caller knows it.
        hints: what else is known: "root", the path in the file; "suffix" of the file's name;
            "model_type" or "architecture" of a config beside it.
        shapes: the tensors by name, to distinguish tables with the same names.
        also: names in the file that are not the network's, and show what wrote it.

    Raises:
        CheckpointError: the network is none of those here; or no table fits, or several do: the
            message says which, and what would decide.
        InputError: there is no format of that name.
    """
    keys, hints = list(keys), dict(hints or {})
    if name is not None and name not in NAMES:
        raise InputError(f"the format must be one of {', '.join(NAMES)}; given {name!r}.")
    for pattern, what in _REFUSED:
        if odd := [key for key in keys if re.fullmatch(pattern, key)]:
            raise CheckpointError(
                f"this network has {what}, which no model here has: {some(odd, 4)}."
            )
    counts: list[tuple[int, Format]] = []
    twice: CheckpointError | None = None
    for table in FORMATS:
        if name is not None and table.name != name:
            continue
        try:
            bare = table.strip(keys)
        except CheckpointError as error:  # two keys that are one in this format
            twice = error
            continue
        if any(key not in bare for key in table.requires) or any(k in bare for k in table.lacks):
            continue
        architecture = hints.get("architecture")
        if architecture and table.named is not None and not table.named(architecture):
            continue
        if not architecture and table.signs and not _has_sign(table, bare):
            continue
        found = {key: table.rule_for_foreign(key) for key in bare}
        if not any(
            hit and {_CANONICAL, _TEXT} & {*hit[0].canonical_names} for hit in found.values()
        ):
            continue
        unknown = [k for k, hit in found.items() if hit is None and not table.why_ignored(k)]
        wrong = (
            sum(_rank_differs(hit[0], shapes.get(bare[k])) for k, hit in found.items() if hit)
            if shapes
            else 0
        )
        counts.append((len(unknown) + wrong, table))
    fewest = min((count for count, _ in counts), default=None)
    if fewest is None and twice is not None:
        raise twice
    if fewest is None or fewest > len(keys) // 2:
        raise CheckpointError(
            _not_a_network(keys)
            if name is None
            else f"these are not weights in the format {name!r}: " + _not_a_network(keys)
        )
    best = _same_family([table for count, table in counts if count == fewest], hints)
    best = _prefer(best, keys, hints, tuple(also))
    if len(best) > 1:
        described = " and ".join(dict.fromkeys(f"{t.name} ({t.describes})" for t in best))
        what = (
            "the names of these weights fit {} equally well; each leaves {} names unexplained"
            if fewest
            else "the names of these weights fit {} equally well, and the networks differ in what "
            "no weight shows (here: how positions are resampled to another image size)"
        )
        raise CheckpointError(
            what.format(described, fewest)
            + ". Say which it is: `--from` of the command, `format=` in Python, or a config.json "
            "beside the file."
        )
    return best[0]


def _has_sign(table: Format, keys: Iterable[str]) -> bool:
    return any(re.fullmatch(sign, key) for sign in table.signs for key in keys)


def _rank_differs(rule, tensor) -> bool:
    rank = rule.layout.foreign_rank
    return tensor is not None and rank is not None and len(tensor.shape) != rank


def _same_family(tables: list[Format], hints: Mapping[str, str]) -> list[Format]:
    """Only tables of the family that the config beside the file names, if there are any."""
    family = hints.get("model_type", "")
    family = "vit" if family in ("vit_extended", "vit_mae", "vit-hybrid") else family
    named = [table for table in tables if family in table.families]
    return named or tables


def _prefer(
    tables: list[Format], keys: list[str], hints: Mapping[str, str], also: tuple[str, ...]
) -> list[Format]:
    """Decide between tables that know the same keys, by their clues."""
    if len({id(table.rules) for table in tables}) == 1 and len({t.name for t in tables}) == 1:
        return tables[:1]
    if len({t.name for t in tables}) == 1 or all(t.files.described for t in tables):
        # DeiT's and ViT's heads, or DINOv2 with either MLP: the first, if they know the same keys.
        # If they do not, the file is a mixture.
        known = [
            frozenset(full for key, full in t.strip(keys).items() if t.rule_for_foreign(key))
            for t in tables
        ]
        return tables[:1] if len(set(known)) == 1 else tables
    found = Found(
        (*keys, *also),
        hints.get("root", ""),
        hints.get("suffix", ""),
        hints.get("architecture", ""),
    )
    ranks = [
        (clue.rank, table.name) for table in tables for clue in table.clues if clue.holds(found)
    ]
    if ranks:
        _, name = min(ranks)
        return _prefer([table for table in tables if table.name == name], keys, hints, also)
    if "model_type" in hints and len({_meaning(table, keys) for table in tables}) == 1:
        return tables[:1]  # the configuration says what the weights do not
    return [table for table in tables if table.candidate] or tables


def _meaning(table: Format, keys: list[str]) -> frozenset[tuple[str, tuple[str, ...], str]]:
    """What a table makes of these keys: each with the parameters it holds, and how they lie."""
    return frozenset(
        (key, hit[0].canonical_names, hit[0].layout.name)
        for key in table.strip(keys)
        if (hit := table.rule_for_foreign(key)) is not None
    )
