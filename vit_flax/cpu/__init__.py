"""What a processor has, and how a network's products are written for it."""

from vit_flax.cpu.half import HalfProducts, choose_half_products, half_products

__all__ = ["HalfProducts", "choose_half_products", "half_products"]
