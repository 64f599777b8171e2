"""The models as NNX modules: the same networks and parameters under Flax's newer interface.

    from flax import nnx
    from vit_flax import FlaxViTForImageClassification
    from vit_flax.nnx import from_pretrained

    model = from_pretrained(FlaxViTForImageClassification, "google/vit-base-patch16-224")
    model.vit.encoder.layer[0].attention.attention.query.kernel  # nnx.Param (768, 768)

parts.py holds the tree of modules; model.py the whole model, which comes from a linen model and
turns back into one.
"""

from vit_flax.nnx.model import NNXModel, from_linen, from_pretrained, to_linen
from vit_flax.nnx.parts import NNXPart, Quantized

__all__ = ["NNXModel", "NNXPart", "Quantized", "from_linen", "from_pretrained", "to_linen"]
