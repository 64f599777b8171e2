"""Fine-tune a head with Flax NNX: are handwritten digits odd or even?

    pip install ".[train]" scikit-learn
    python examples/nnx_fine_tune.py --output odd-or-even

The network is the one for digits that the package ships. It stays as it is; a new head with two
classes is trained, saved, and loaded again as a linen model.
"""

from __future__ import annotations

import argparse

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from vit_common.embedded import embedded_checkpoint
from vit_flax import FlaxViTForImageClassification
from vit_flax.nnx import from_pretrained


def main() -> None:
    """Train, score and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder to write the network into")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()

    digits = load_digits()
    pixels = (digits.images[:, None] / 8 - 1).astype(np.float32)  # (B, 1, 8, 8), -1 to 1
    x, held_out, y, wanted = train_test_split(pixels, digits.target % 2, random_state=0)

    model = from_pretrained(
        FlaxViTForImageClassification,
        embedded_checkpoint(),
        id2label={0: "even", 1: "odd"},
        ignore_mismatched_sizes=True,  # the head of ten classes makes way for a new one
    )
    head = nnx.PathContains("classifier")
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=head)

    @nnx.jit
    def step(model, optimizer, images, labels):
        def loss(model):
            return model(images, labels=labels).loss

        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, head))(model)
        optimizer.update(model, gradients)
        return value

    rng = np.random.default_rng(0)
    for _ in range(args.steps):
        chosen = rng.choice(len(x), 128, replace=False)
        step(model, optimizer, x[chosen], y[chosen])

    model.save_pretrained(args.output)
    linen = FlaxViTForImageClassification.from_pretrained(args.output)
    right = jnp.mean(linen(held_out).logits.argmax(-1) == wanted)
    print(f"held-out accuracy: {right:.3f}")


if __name__ == "__main__":
    main()
