"""Published checkpoints straight from the real Hub, against the numbers their tests publish.

Run by `make test-online`: some gigabytes. The numbers, and how far they may be off, are those of
Transformers' own tests, collected with their sources in the shared published.json; each is of one
photo, which comes from Transformers' repository. Skipped where either cannot be reached.
"""

from __future__ import annotations

import io
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

import vit_flax
import vit_torch
from vit_flax import AutoImageProcessor
from vit_torch.pretrained import to_numpy

pytestmark = pytest.mark.online

PUBLISHED = Path(__file__).resolve().parents[2] / "shared" / "data" / "published.json"
# Two cats on a sofa: the image that every number below is of. (The JPEG it was decoded from gives
# other last digits with another decoder.)
PHOTO = (
    "https://raw.githubusercontent.com/huggingface/transformers/v4.57.6/"
    "tests/fixtures/tests_samples/COCO/000000039769.png"
)
SECONDS = 20


class Golden(NamedTuple):
    """How a published number is made.

    Attributes:
        name: our class, without "Flax".
        field: of its output.
        part: of that field, the batch included.
        processor: options of the image processor.
        inputs: of the call.
    """

    name: str
    field: str
    part: tuple[Any, ...]
    processor: dict[str, Any] = {}  # noqa: RUF012  # never changed
    inputs: dict[str, Any] = {}  # noqa: RUF012


LOGITS = ("logits", (0, slice(3)))
TOKENS = ("last_hidden_state", (0, slice(3), slice(3)))
GOLDEN = {
    "google/vit-base-patch16-224": Golden("ViTForImageClassification", *LOGITS),
    "facebook/dino-vits8": Golden(
        "ViTModel", *TOKENS, {"size": 480}, {"interpolate_pos_encoding": True}
    ),
    "facebook/deit-base-distilled-patch16-224": Golden(
        "DeiTForImageClassificationWithTeacher", *LOGITS
    ),
    "microsoft/beit-base-patch16-224": Golden("BeitForImageClassification", *LOGITS),
    "microsoft/beit-base-patch16-224-pt22k": Golden(
        "BeitForMaskedImageModeling",
        "logits",
        TOKENS[1],
        inputs={"bool_masked_pos": np.ones((1, 196), bool)},
    ),
    "microsoft/beit-large-patch16-224-pt22k-ft22k": Golden("BeitForImageClassification", *LOGITS),
    "facebook/dinov2-base": Golden("Dinov2Model", *TOKENS),
    "facebook/dinov2-with-registers-base": Golden("Dinov2WithRegistersModel", *TOKENS),
}
NOT_OURS = {
    "facebook/vit-mae-base": "a masked autoencoder with a decoder of its own",
    "facebook/dinov3-vits16-pretrain-lvd1689m": "rotary positions; and its weights are gated",
    "facebook/data2vec-vision-base-ft1k": "another family",
    "google/siglip-base-patch16-224": "similarities of texts, for which its tokenizer is needed",
}


@pytest.fixture(scope="module")
def published() -> dict[str, dict[str, Any]]:
    """The rows of the table by the model's name."""
    if not PUBLISHED.is_file():
        pytest.skip("the shared published.json is not beside this clone")
    return {row["model"]: row for row in json.loads(PUBLISHED.read_text())["hf_slices"]}


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=SECONDS) as answer:
        return answer.read()


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """The photo, once the Hub has answered too."""
    for url in (f"{constants.ENDPOINT}/{next(iter(GOLDEN))}/resolve/main/config.json", PHOTO):
        try:
            content = fetch(url)
        except urllib.error.HTTPError as error:
            if error.code in (401, 404):
                raise  # reached, and something has gone
            pytest.skip(f"{url} answers {error.code}")
        except OSError as error:
            pytest.skip(f"{url} cannot be reached: {error}")
    return Image.open(io.BytesIO(content)).convert("RGB")


def test_every_published_number_is_here_or_of_another_network(published):
    assert published.keys() == GOLDEN.keys() | NOT_OURS.keys()


@pytest.mark.filterwarnings("ignore:.*not used")  # DINO's checkpoint, whose pooler is not trained
@pytest.mark.filterwarnings("ignore:.*newly drawn")
@pytest.mark.parametrize("twin", ["flax", "torch"])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_numbers(name, twin, published, photo):
    golden, row = GOLDEN[name], published[name]
    processor = AutoImageProcessor.from_pretrained(name, **golden.processor)
    pixels = np.asarray(processor(photo, return_tensors="np")["pixel_values"])
    if twin == "flax":
        model = getattr(vit_flax, f"Flax{golden.name}").from_pretrained(name, precision="highest")
        output = model(pixels, **golden.inputs)
        found = np.asarray(output[golden.field])
    else:
        model = getattr(vit_torch, golden.name).from_pretrained(name)
        inputs = {
            key: torch.tensor(value) if isinstance(value, np.ndarray) else value
            for key, value in golden.inputs.items()
        }
        with torch.no_grad():
            found = to_numpy(model(torch.tensor(pixels), **inputs)[golden.field])
    if "shape" in row:
        assert list(found.shape) == row["shape"]
    # As Transformers compares them: the tolerance is also relative.
    tolerance = row["tol"]
    np.testing.assert_allclose(found[golden.part], row["value"], rtol=tolerance, atol=tolerance)
    if "argmax" in row:
        assert int(found[0].argmax()) == row["argmax"]
