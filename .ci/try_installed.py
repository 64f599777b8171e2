"""What `.ci/wheel` runs in an environment that holds only the installed wheel."""

import importlib
import json
import pathlib
import pkgutil
import subprocess
import sys
import tempfile

here = pathlib.Path.cwd()
found = []
for top in ("vit_common", "vit_convert", "vit_flax", "vit_cli"):
    package = importlib.import_module(top)
    place = pathlib.Path(package.__file__)
    assert "site-packages" in place.parts, place
    for module in pkgutil.walk_packages(package.__path__, top + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
            found.append(module.name)
assert len(found) > 80, found
assert importlib.util.find_spec("convert") is None, "the wheel installs a package `convert`"

import numpy as np  # noqa: E402

import vit_flax  # noqa: E402
from vit_common.embedded import embedded_checkpoint, embedded_images  # noqa: E402
from vit_convert import convert  # noqa: E402
from vit_flax import FlaxViTForImageClassification, ViTImageProcessor  # noqa: E402
from vit_flax.inference import ImageClassifier  # noqa: E402

for name in vit_flax.__all__:
    assert getattr(vit_flax, name) is not None

images = embedded_images()
predictions = ImageClassifier.from_pretrained(embedded_checkpoint())(images)
assert [p[0].label for p in predictions] == [path.stem.split("-")[1] for path in images]

with tempfile.TemporaryDirectory() as folder:
    for to in ("timm", "flax", "hub", "google"):
        target = pathlib.Path(folder) / (to if to != "google" else "google.npz")
        convert(embedded_checkpoint(), target, to=to)
    model = FlaxViTForImageClassification.from_pretrained(pathlib.Path(folder) / "flax")
    processor = ViTImageProcessor.from_pretrained(pathlib.Path(folder) / "hub")
    import PIL.Image

    pixels = processor([PIL.Image.open(path) for path in images[:3]], return_tensors="np")
    logits = np.asarray(model(**pixels).logits)
    assert [int(row.argmax()) for row in logits] == [
        int(path.stem.split("-")[1]) for path in images[:3]
    ]
    # A file convert.py in the folder somebody works in is theirs.
    (pathlib.Path(folder) / "convert.py").write_text("raise SystemExit('theirs')")
    command = [sys.executable, "-m", "vit_cli", "predict", "--json", "--top-k", "1", str(images[0])]
    ran = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    assert json.loads(ran.stdout)["predictions"][0]["label"] == images[0].stem.split("-")[1]
print(f"{len(found)} modules import; prediction, conversion and the command work in {here.name}")
