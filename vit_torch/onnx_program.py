"""Classify images with an exported ONNX file; needs onnxruntime, numpy and Pillow, nothing else.

    python THIS_FILE image.jpg [more images]

In another program: `Model().classify(["image.jpg"])` gives labels with probabilities, `features`
the vectors of a network without a classifier, and `prepare` the pixels alone. Labels and
preprocessing are read from the ONNX file, which lies beside this program unless `Model(path)` names
another. Pixels are prepared as by the image processor that the model was exported with.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import PIL.Image
import PIL.ImageOps

MODEL = Path(__file__).with_name(Path(__file__).stem.removesuffix("_onnx") + ".onnx")


class Model:
    """An exported ONNX file.

    Attributes:
        labels: of the classes; empty for a network that gives features.
        how: the options of the image processor.
        shape: (channels, height, width) of the pixels that the network takes.
    """

    def __init__(self, path=MODEL, **session_options):
        self.session = onnxruntime.InferenceSession(str(path), **session_options)
        about = self.session.get_modelmeta().custom_metadata_map
        self.labels = json.loads(about["labels"])
        self.how = json.loads(about["preprocessing"])
        self.shape = tuple(json.loads(about["input_shape"]))
        self.batch = json.loads(about["batch"]) if about["batch"].isdigit() else None
        self.several = json.loads(about["several"])

    def prepare(self, image):
        """Name of a file, open file or PIL image -> float32 (C, H, W)."""
        how, (channels, height, width) = self.how, self.shape
        if not isinstance(image, PIL.Image.Image):
            image = PIL.Image.open(image)
        image = PIL.ImageOps.exif_transpose(image)  # upright
        image = in_mode(image, {1: "L", 3: "RGB", 4: "RGBA"}[channels])
        if how.get("do_convert_rgb"):
            image = in_mode(image, "RGB")
        if how.get("do_resize"):
            image = image.resize(self._resized(image.size), resample=how["resample"])
        values = np.asarray(image)
        values = values[..., None] if values.ndim == 2 else values  # (H, W, C)
        if how.get("do_center_crop"):
            crop = how["crop_size"]
            values = center_crop(values, crop["height"], crop["width"], how.get("crop_rounding"))
        if how.get("do_rescale"):
            values = (values.astype(np.float64) * how["rescale_factor"]).astype(np.float32)
        values = values.astype(np.float32)
        if how.get("do_normalize"):
            mean, std = (np.asarray(how[name], np.float32) for name in ("image_mean", "image_std"))
            values = (values - mean) / std
        values = values.transpose(2, 0, 1)
        if values.shape != (channels, height, width):
            raise ValueError(f"the image became {values.shape}; the network takes {self.shape}")
        return np.ascontiguousarray(values)

    def _resized(self, size):
        """(width, height) after the resize."""
        wanted = self.how["size"]
        if "shortest_edge" not in wanted:
            return wanted["width"], wanted["height"]
        short, edge = min(size), wanted["shortest_edge"]
        long = int(edge * max(size) / short)
        return (edge, long) if size[0] <= size[1] else (long, edge)

    def run(self, pixel_values):
        """float32 (B, C, H, W) -> logits (B, K) or features (B, D)."""
        pixel_values = np.asarray(pixel_values, np.float32)
        if self.batch is None:
            return self.session.run(None, {"pixel_values": pixel_values})[0]
        rows = []  # the file takes so many at once, and no fewer
        for start in range(0, len(pixel_values), self.batch):
            part = pixel_values[start : start + self.batch]
            padded = np.zeros((self.batch, *self.shape), np.float32)
            padded[: len(part)] = part
            rows.append(self.session.run(None, {"pixel_values": padded})[0][: len(part)])
        return np.concatenate(rows)

    def features(self, images):
        """Images -> (B, D)."""
        return self.run(np.stack([self.prepare(image) for image in images]))

    def classify(self, images, top_k=5):
        """Images -> for each a list of (label, probability), best first."""
        logits = self.run(np.stack([self.prepare(image) for image in images]))
        logits = logits.astype(np.float64)
        if self.several:  # classes that do not exclude each other
            probabilities = 1.0 / (1.0 + np.exp(-logits))
        else:
            powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
            probabilities = powers / powers.sum(axis=-1, keepdims=True)
        return [
            [(self.labels[i], float(row[i])) for i in np.argsort(-row, kind="stable")[:top_k]]
            for row in probabilities
        ]


def in_mode(image, mode):
    """A PIL image in another mode; 16 bits and numbers from 0 to 1 are scaled to 8 bits."""
    if image.mode == mode:
        return image
    if image.mode.startswith("I"):
        values = np.asarray(image)
        sixteen = image.mode != "I" or values.max() > 255 or image.format in ("PNG", "PPM")
        if sixteen:
            eight = (values.astype(np.uint32) + 128) // 257
            image = PIL.Image.fromarray(eight.astype(np.uint8))
    elif image.mode == "F" and np.asarray(image).max() <= 1:
        image = PIL.Image.fromarray(np.rint(np.asarray(image) * 255).astype(np.uint8))
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    elif image.mode == "LAB":
        image = image.convert("RGB")
    elif image.mode == "1":
        image = image.convert("L")
    return image.convert(mode)


def center_crop(values, height, width, rounding=None):
    """The middle of (H, W, C), padded with zeros where a side is too short."""
    excess = [values.shape[0] - height, values.shape[1] - width]
    if rounding == "half_to_even":  # as torchvision rounds
        starts = [round(more / 2) if more >= 0 else -(-more // 2) for more in excess]
    else:
        starts = [more // 2 for more in excess]
    top, left = (max(start, 0) for start in starts)
    values = values[top : top + height, left : left + width]
    padded = np.zeros((height, width, values.shape[2]), values.dtype)
    top, left = (max(-start, 0) for start in starts)
    padded[top : top + values.shape[0], left : left + values.shape[1]] = values
    return padded


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"usage: python {sys.argv[0]} IMAGE [IMAGE ...]")
    model = Model()
    for name in sys.argv[1:]:
        try:
            if not model.labels:
                print(name, *model.features([name])[0].tolist())
                continue
            for label, probability in model.classify([name])[0]:
                print(f"{name}  {probability:.4f}  {label}")
        except (OSError, ValueError) as error:
            sys.exit(f"{name}: {error}")
