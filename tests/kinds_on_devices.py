"""What tests/test_kinds.py runs on four processors that XLA makes of one: logits and gradients of
every kind on them, beside those on one. Prints JSON: kind -> mesh -> largest difference, relative
to the largest number."""

import json
import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from kinds import KINDS, config_of
from networks import flax_twin, images, random_weights

from vit_flax import FlaxViTForImageClassification
from vit_flax.sharding import AXES, TRAINING_AXES, batch_sharding, make_mesh, place

MESHES = {
    "inference": ({"data": 2, "model": 2}, AXES),
    "training": ({"data": 2, "fsdp": 2}, TRAINING_AXES),
}
SIZES = {"num_attention_heads": 2, "hidden_size": 32, "num_hidden_layers": 1}


def main() -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for kind in sys.argv[1:] or KINDS:
        config = config_of(kind, **SIZES)
        weights = random_weights(config, "classifier")
        model = flax_twin(FlaxViTForImageClassification, config, weights)
        x = jnp.asarray(images(config, 4).transpose(0, 2, 3, 1), jnp.float32)

        def loss(params, x, model=model):
            logits = model.module.apply({"params": params}, x).logits
            return jnp.square(logits).mean(), logits

        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        wanted = step(model.params, x)
        found[kind] = {}
        for name, (sizes, axes) in MESHES.items():
            mesh = make_mesh(sizes, config, axes)
            given = step(place(model.params, mesh), jax.device_put(x, batch_sharding(mesh)))
            pairs = zip(jax.tree.leaves(given), jax.tree.leaves(wanted), strict=True)
            found[kind][name] = max(
                float(np.abs(np.asarray(a) - np.asarray(b)).max())
                / max(float(np.abs(np.asarray(b)).max()), 1e-2)
                for a, b in pairs
            )
        print(kind, found[kind], file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
