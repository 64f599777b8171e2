"""8-bit integers: weights held in them, and products computed in them.

`quantize(params)` holds the kernels of a network's blocks in 8 bits and multiplies in the compute
dtype; `quantize(params, activations="int8")` quantises the activations too, row by row inside the
program, and multiplies integers by integers. torchao calls the two `Int8WeightOnlyConfig` and
`Int8DynamicActivationInt8WeightConfig`; qwix a `QuantizationRule` with `weight_qtype="int8"`, and
with `act_qtype="int8"` as well.

weights.py makes the parameters, layer.py computes with them, product.py says which instructions
multiply, and smooth.py moves outlier channels of the activations into the weights.
"""

from vit_flax.int8.layer import Dense
from vit_flax.int8.product import Product, choose_product
from vit_flax.int8.weights import (
    SCALE,
    SUMS,
    check_activations,
    check_weights,
    is_quantized,
    parameter_bytes,
    quantize,
)

__all__ = [
    "SCALE",
    "SUMS",
    "Dense",
    "Product",
    "check_activations",
    "check_weights",
    "choose_product",
    "is_quantized",
    "parameter_bytes",
    "quantize",
]
