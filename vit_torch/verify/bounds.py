"""The one table of bounds on differences, with what was measured beside each.

Weights of the suites are drawn so that activations are of unit scale. Each bound is at most ten
times the largest difference seen over `tests/test_parity.py` and `tests/test_families.py` (JAX
0.10.2, torch 2.13, CPU). `vit verify` multiplies those of activations by the stage's largest value
where that is above one: rounding errors are relative.
"""

BOUNDS = {
    # over every stage of every configuration
    "twins float64": 1e-13,  # measured 1.2e-14
    "twins float32": 2e-5,  # measured 6.7e-6
    # every stage at the presets' depths, relative to the stage's largest value where that is above
    # one (tests/test_suite.py)
    "deep float64": 1e-14,  # measured 2.2e-15
    "deep float32": 6e-6,  # measured 9.5e-7
    # a norm of rows whose mean is a hundred times their spread, either twin against float64
    "offset norm float32": 1e-4,  # measured 1.7e-5
    # an image alone against the same image among eight
    "batch float32": 5e-6,  # measured 6.0e-7
    # against Transformers 4.57.6, PyTorch
    "reference float64": 1e-13,  # measured 1.1e-14
    "reference float32": 2e-5,  # measured 5.7e-6
    # against Transformers 4.57.6, Flax, which takes LayerNorm's variance in one pass
    "flax reference": 2e-5,  # measured 4.8e-6
    # relative to the largest entry of each parameter's gradient
    "gradients float64": 3e-14,  # measured 3.0e-15
    "gradients float32": 1e-5,  # measured 1.5e-6
    # every number of a training run over 200 steps: learning rates, losses, norms, parameters,
    # averages; moments relative to their largest entry (tests/test_training_runs.py)
    "training float64": 1e-9,  # measured 1.3e-13 (moments), losses 2.1e-15
    # biases of keys, whose gradient is rounding that Adam divides by itself
    "training key biases": 1e-8,  # measured 1.2e-11
    # losses of AdamW over 200 steps
    "training float32": 1e-5,  # measured 7.2e-7
    # losses of SGD, whose momentum lets rounding grow, over 50 steps
    "training SGD float32": 3e-4,  # measured 2.6e-5
    # each activation by itself, over -9 to 9
    "activations float64": 3e-14,  # measured 3.6e-15
    "activations float32": 5e-6,  # measured 9.5e-7
}

HALF_PRECISION = 2.0
"""How much larger the Flax twin's root mean square error against float32 may be than that of the
PyTorch twin in the same half precision. Measured in bfloat16: at most 1.13 over DeiT-Tiny's stages,
1.62 over those of the embedded digits network and 1.60 over tests/test_suite.py. Flax rounds a
product before it adds the bias and again after, PyTorch once; with one rounding the first two were
1.02 and 1.41."""
