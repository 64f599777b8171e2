"""The one table of bounds on the largest absolute difference, with what was measured.

Weights of the suites here are drawn so that activations are of unit scale. Each bound is at most
ten times the largest difference seen over the whole suite (CPU; JAX 0.10.2, torch 2.13).
"""

BOUNDS = {
    "activations float64": 1e-14,
    "activations float32": 2e-6,
    "twins float64": 1e-11,
    "twins float32": 2e-5,
    "reference float64": 1e-11,
    "reference float32": 2e-5,
    "gradients float64": 1e-11,
    "gradients float32": 1e-4,
    "flax reference": 2e-5,
}
