"""What is found in files of people's own training, and what is asked for instead of guessed."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm_table
import torch
import transformers
from peers import (
    FLOAT32,
    FLOAT64,
    assert_close,
    load_flax,
    pixels,
    randomise,
    run_flax,
    run_peer,
    run_torch,
)
from timm_models import timm
from torch import nn

import vit_convert
import vit_torch
from vit_common.errors import CheckpointError
from vit_convert.convert import convert
from vit_convert.formats import FORMATS, NAMES, mae, moco
from vit_convert.formats.timm import models as timm_models
from vit_convert.infer import PUBLISHED
from vit_convert.source import open_source

HEADS = {"num_attention_heads": 4}
SIZES = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip


# -- classifiers under people's own names


class Wrapped(nn.Module):
    """What a training script makes: a backbone and a linear layer on its class token."""

    def __init__(self, backbone: nn.Module, inner: str, names: tuple[str, ...]) -> None:
        super().__init__()
        self.inner, self.last = inner, names[0]
        setattr(self, inner, backbone)
        linear: nn.Module = nn.Linear(48, 5)
        for name in names[:0:-1]:
            linear = nn.Sequential(*(nn.Identity() for _ in range(int(name))), linear)
        setattr(self, names[0], linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = getattr(self, self.inner)(x)
        features = getattr(features, "last_hidden_state", features)
        features = features[:, 0] if features.ndim == 3 else features
        return getattr(self, self.last)(features)


def timm_backbone() -> nn.Module:
    sizes = {"depth": 2, "embed_dim": 48, "num_heads": 4, "img_size": 32, "patch_size": 8}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes)


def hub_backbone() -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(**SIZES), add_pooling_layer=False)


CASES = [
    ("backbone", ("fc",)),
    ("encoder", ("classifier",)),
    ("model", ("linear",)),
    ("vit", ("head", "1")),  # nn.Sequential(nn.Dropout(), nn.Linear())
    ("net", ("mlp_head",)),
    ("backbone", ("predictor",)),
]


@pytest.mark.parametrize(("inner", "names"), CASES)
def test_a_classifier_beside_a_backbone_of_timm(inner, names, tmp_path):
    model = randomise(Wrapped(timm_backbone(), inner, names))
    path = tmp_path / "best.pth"
    torch.save({"model": model.state_dict()} if inner == "vit" else model.state_dict(), path)
    options = {**HEADS, "format": "timm"}
    report = convert(path, tmp_path / "hub", from_="timm", overrides=HEADS)
    (note,) = [note for note in report.set if note.field == "classifier"]
    assert ".".join(names) in note.value
    assert report.architecture == "ViTForImageClassification"
    x = pixels()
    want = run_peer(model.double(), x)
    assert want.shape == (2, 5)
    with pytest.warns(UserWarning, match=rf"taken as the classifier: .*{'.'.join(names)}"):
        assert_close(run_torch(path, x, **options), want, FLOAT64)
    with pytest.warns(UserWarning, match="taken as the classifier"):
        assert_close(run_flax(load_flax(path, **options), x), want, FLOAT32)
    assert_close(run_torch(tmp_path / "hub", x), want, FLOAT64)


@pytest.mark.parametrize(("inner", "names"), CASES[:3])
def test_a_classifier_beside_a_backbone_of_transformers(inner, names, tmp_path):
    """The config.json is the backbone's, and says two classes."""
    model = randomise(Wrapped(hub_backbone(), inner, names))
    place = tmp_path / "in"
    place.mkdir()
    torch.save(model.state_dict(), place / "pytorch_model.bin")
    transformers.ViTConfig(**SIZES).save_pretrained(place)
    x = pixels()
    want = run_peer(model.double(), x)
    with pytest.warns(UserWarning, match="taken as the classifier"):
        assert_close(run_torch(place, x), want, FLOAT64)
    with pytest.warns(UserWarning, match="taken as the classifier"):
        assert_close(run_flax(load_flax(place), x), want, FLOAT32)
    report = convert(place, tmp_path / "hub")
    assert any(note.field == "classifier" for note in report.set)
    assert_close(run_torch(tmp_path / "hub", x), want, FLOAT64)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("where", ["beside", "inside"])
def test_a_classifier_with_and_without_a_bias(where, bias, tmp_path):
    model = randomise(Wrapped(timm_backbone(), "backbone", ("fc",)))
    if not bias:
        model.fc.bias = None
    state = model.state_dict()
    if where == "inside":
        state = {name.removeprefix("backbone."): value for name, value in state.items()}
    torch.save(state, tmp_path / "file.pth")
    report = convert(tmp_path / "file.pth", tmp_path / "hub", from_="timm", overrides=HEADS)
    (note,) = [note for note in report.set if note.field == "classifier"]
    assert note.value == f"fc.weight and {'fc.bias' if bias else 'no bias'}"
    x = pixels()
    assert_close(run_torch(tmp_path / "hub", x), run_peer(model.double(), x), FLOAT64)


def test_a_matrix_in_a_block_is_no_classifier(tmp_path):
    state = {**timm_backbone().state_dict(), "blocks.1.mlp.linear.weight": torch.ones(5, 48)}
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=r"mlp\.linear\.weight: nothing here knows"):
        convert(tmp_path / "file.pth", tmp_path / "out", from_="timm", overrides=HEADS)


def test_what_could_be_a_classifier_and_is_not_alone_is_named(tmp_path):
    """Two layers, or two tasks: no network here has them."""
    state = {f"backbone.{n}": v for n, v in timm_backbone().state_dict().items()}
    state |= {"fc.0.weight": torch.ones(48, 48), "fc.0.bias": torch.ones(48)}
    state |= {"fc.2.weight": torch.ones(5, 48), "fc.2.bias": torch.ones(5)}
    torch.save(state, tmp_path / "two.pth")
    with pytest.raises(CheckpointError, match=r"fc\.0\.weight: nothing here knows"):
        convert(tmp_path / "two.pth", tmp_path / "out", from_="timm", overrides=HEADS)


@pytest.mark.parametrize("name", ["head.mlp.0.weight", "head.mlp.weight"])
def test_a_head_of_ones_own_is_no_head_of_a_pretraining(name, tmp_path):
    """DINO's has a last layer too."""
    for prefix in ("", "backbone."):
        state = {f"{prefix}{n}": v for n, v in timm_backbone().state_dict().items()}
        state |= {name: torch.ones(48, 48), "head.out.weight": torch.ones(5, 48)}
        torch.save(state, tmp_path / "file.pth")
        with pytest.raises(CheckpointError, match=f"{name}: nothing here knows"):
            convert(tmp_path / "file.pth", tmp_path / "out", from_="timm", overrides=HEADS)


@pytest.mark.parametrize("name", ["projector.weight", "fc.weight"])
def test_tensors_beside_a_known_prefix_are_not_dropped(name, tmp_path):
    """A projection of another name, or a classifier of another width."""
    state = {f"backbone.{n}": v for n, v in timm_backbone().state_dict().items()}
    state[name] = torch.ones(5, 48 if "proj" in name else 47)
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=f"{name}: nothing here knows"):
        convert(tmp_path / "file.pth", tmp_path / "out", from_="timm", overrides=HEADS)
    report = convert(
        tmp_path / "file.pth", tmp_path / "out", from_="timm", overrides=HEADS, ignore=[name]
    )
    assert report.ignored[name] == "given up by the caller"


def test_a_checkpoint_of_lightning_is_its_network(tmp_path):
    """A prefix of the module's own, a loss with weights of the classes, and the rest."""
    model = randomise(Wrapped(timm_backbone(), "backbone", ("classifier",)))
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    state |= {"criterion.weight": torch.ones(5), "train_acc.tp": torch.arange(5)}
    moments = {"exp_avg": torch.ones(5, 48), "step": torch.tensor(3.0)}
    torch.save(
        {
            "state_dict": state,
            "optimizer_states": [{"state": {0: moments}, "param_groups": [{"lr": 0.1}]}],
            "lr_schedulers": [{"base_lrs": [0.1]}],
            "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.9)}},
            "epoch": 3,
        },
        tmp_path / "last.ckpt",
    )
    report = convert(tmp_path / "last.ckpt", tmp_path / "hub", from_="timm", overrides=HEADS)
    assert set(report.ignored.values()) <= {
        "of the loss of a training",
        "state of the optimizer",
        "of a training's progress",
        "outside 'state_dict/model.backbone.', where the network is",
    }
    x = pixels()
    assert_close(run_torch(tmp_path / "hub", x), run_peer(model.double(), x), FLOAT64)


def test_counters_beside_the_network_are_no_weights(tmp_path):
    state = {f"backbone.{n}": v for n, v in timm_backbone().state_dict().items()}
    state |= {"logit_scale": torch.tensor(2.0), "seen": torch.arange(9), "epoch": torch.tensor(3)}
    torch.save(state, tmp_path / "file.pth")
    report = convert(tmp_path / "file.pth", tmp_path / "out", from_="timm", overrides=HEADS)
    assert set(report.ignored) == {"logit_scale", "seen", "epoch"}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("attn_pool.latent", "attention pooling"),
        ("norm_pre.weight", "a norm before the blocks"),
        ("blocks.0.attn.q_norm.weight", "norms of query and key"),
        ("blocks.1.mlp.norm.weight", "a norm inside attention or MLP"),
    ],
)
def test_parts_that_change_the_network_are_named(name, part, tmp_path):
    state = {**timm_backbone().state_dict(), name: torch.ones(48)}
    torch.save({"state_dict": state}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=f"{name}: nothing here knows.*{part}"):
        convert(tmp_path / "file.pth", tmp_path / "out", from_="timm", overrides=HEADS)


# -- heads of attention


def published_of_timm() -> dict[str, tuple[tuple[int, int, int, bool], int, bool]]:
    """timm's name -> (width, depth, width of the MLP, whether it is gated), heads, and whether there is a class token;
    from the arguments its own functions give its models."""
    found = {}
    for name in timm_models.HEADS:
        cls, args = timm_table.arguments_of(name)
        if cls in ("NaFlexVit", "VisionTransformerRelPos", "VisionTransformerSAM"):
            continue  # their names say what they are
        if args.get("qk_norm"):
            continue  # the norm's width is that of a head
        width, depth = args.get("embed_dim", 768), args.get("depth", 12)
        inner = int(width * args.get("mlp_ratio", 4.0))
        packed = "GluMlp" in str(args.get("mlp_layer", ""))
        if packed:
            inner //= 2
        if align := args.get("swiglu_align_to"):
            inner += -inner % align
        gated = packed or args.get("swiglu_mlp", False)
        token = args.get("class_token", True)
        found[name] = ((width, depth, inner, gated), args.get("num_heads", 12), token)
    return found


def test_every_published_network_has_the_heads_it_was_published_with():
    """Of timm and of every format: no two that share all sizes differ silently in their heads."""
    heads: dict[Any, dict[int, list[str]]] = {}
    for name, (sizes, count, token) in published_of_timm().items():
        assert count == timm_models.HEADS[name]
        heads.setdefault((*sizes, token), {}).setdefault(count, []).append(name)
    assert len(heads) > 15
    for row in PUBLISHED:
        key = (row.width, row.depth, row.inner, row.gated, row.class_token)
        heads.setdefault(key, {}).setdefault(row.heads, []).append(row.name)
    assert {row for table in FORMATS for row in table.published} <= set(PUBLISHED)
    for key, counts in heads.items():
        known = {
            row.heads
            for row in PUBLISHED
            if (row.width, row.depth, row.inner, row.gated) == key[:4]
        }
        if len(counts) > 1:
            # Either fixed positions tell them apart, or both are named and asked for.
            assert set(counts) <= known, (key, counts)
        elif known and key[4]:
            assert set(counts) <= known, (key, counts)


def state_of(width: int, depth: int, inner: int, positions: np.ndarray | None, cls: bool = True):
    """Names and shapes of timm; the numbers do not matter, but for the positions."""
    state = {
        "pos_embed": torch.randn(1, 196 + cls, width) * 0.02
        if positions is None
        else torch.cat([torch.zeros(int(cls), width), torch.tensor(positions)])[None],
        "patch_embed.proj.weight": torch.zeros(width, 3, 16, 16),
        "patch_embed.proj.bias": torch.zeros(width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    if cls:
        state["cls_token"] = torch.zeros(1, 1, width)
    for i in range(depth):
        shapes = {
            "norm1.weight": (width,), "norm1.bias": (width,), "norm2.weight": (width,),
            "norm2.bias": (width,), "attn.qkv.weight": (3 * width, width),
            "attn.qkv.bias": (3 * width,), "attn.proj.weight": (width, width),
            "attn.proj.bias": (width,), "mlp.fc1.weight": (inner, width), "mlp.fc1.bias": (inner,),
            "mlp.fc2.weight": (width, inner), "mlp.fc2.bias": (width,),
        }  # fmt: skip
        state |= {f"blocks.{i}.{n}": torch.zeros(1).expand(s) for n, s in shapes.items()}
    return state


def heads_found(state: dict[str, torch.Tensor], path: Path, **options: Any) -> int:
    torch.save({"model": {n: v.contiguous() for n, v in state.items()}}, path)
    with open_source(path, format="deit", **options) as source:
        return source.config.num_attention_heads


SMALL, TINY = (384, 12, 1536), (192, 12, 768)


@pytest.mark.parametrize(
    ("sizes", "positions", "heads"),
    [
        (SMALL, None, 6),
        (SMALL, moco.sines_and_cosines, 12),
        (SMALL, mae.sines_and_cosines, 6),
        (TINY, None, 3),
        (TINY, mae.sines_and_cosines, 12),
        (TINY, moco.sines_and_cosines, 3),
    ],
)
def test_fixed_positions_tell_twins_apart(sizes, positions, heads, tmp_path):
    """`convert_to_deit.py` of facebookresearch/moco-v3 leaves nothing else of the ViT-S."""
    fixed = None if positions is None else positions((14, 14), sizes[0])
    assert heads_found(state_of(*sizes, fixed), tmp_path / "file.pth") == heads


@pytest.mark.parametrize(("noise", "heads"), [(0.05, 12), (2.0, 6)])
def test_fine_tuning_may_move_positions_a_little(noise, heads, tmp_path):
    fixed = moco.sines_and_cosines((14, 14), 384)
    drawn = np.random.default_rng(0).normal(size=fixed.shape) * noise * fixed.std()
    state = state_of(*SMALL, (fixed + drawn).astype(np.float32))
    assert heads_found(state, tmp_path / "file.pth") == heads


def test_twins_that_nothing_tells_apart_are_both_named(tmp_path):
    fixed = moco.sines_and_cosines((14, 14), 384)
    state = state_of(*SMALL, 0.5 * fixed)
    with pytest.raises(
        CheckpointError, match=r"ViT-small \(6 heads\) and MoCo v3 ViT-S \(12 heads"
    ) as e:
        heads_found(state, tmp_path / "file.pth")
    assert "`--heads`" in str(e.value)
    assert heads_found(state, tmp_path / "file.pth", overrides={"num_attention_heads": 12}) == 12


def test_twins_without_a_class_token_are_both_named(tmp_path):
    state = state_of(768, 12, 3072, None, cls=False)
    with pytest.raises(CheckpointError, match=r"\(12 heads\) and .*\(16 heads\)"):
        heads_found(state, tmp_path / "file.pth")


def test_the_published_moco_small_runs_with_twelve_heads(tmp_path):
    """All of its sizes, of two blocks that count: the others add nothing."""
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", num_heads=12, num_classes=0).eval()
    with torch.no_grad():
        model.pos_embed[0, 1:] = torch.tensor(moco.sines_and_cosines((14, 14), 384))
    path = tmp_path / "vit-s-300ep.pth.tar"
    state = {f"module.base_encoder.{n}": v for n, v in model.state_dict().items()}
    torch.save({"state_dict": state}, path)
    ours = vit_torch.AutoModel.from_pretrained(path, add_pooling_layer=False).eval()
    x = torch.tensor(pixels((224, 224), 1), dtype=torch.float32)
    with torch.no_grad():
        assert_close(ours(x).last_hidden_state[:, 0].numpy(), model(x).numpy(), FLOAT32)


# -- one place for what is known of formats


def test_no_code_outside_the_formats_compares_their_names():
    """But for the arguments of saving, and the help of a command, which loads nothing."""
    root = Path(vit_convert.__file__).parent
    # Names of families and of libraries too.
    own = set(NAMES) - {"flax", "deit", "beit", "dinov2", "timm"}
    for file in root.glob("*.py"):
        if file.name == "save.py":
            continue
        tree = ast.parse(file.read_text())
        found = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert not own & {text for text in found if isinstance(text, str)}, file


def test_formats_import_only_layouts_and_each_other():
    for file in (Path(vit_convert.__file__).parent / "formats").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("vit_convert"):
                assert str(node.module).startswith(("vit_convert.layouts", "vit_convert.formats"))
