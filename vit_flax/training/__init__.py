"""Training: one step of gradient descent, as a pure function, with any optimizer of optax."""

from vit_flax.training.step import cross_entropy, init_state, make_step

__all__ = ["cross_entropy", "init_state", "make_step"]
