"""`verify`: are two models the same, stage by stage, on every device and in every precision?
`verify_training`: is a training run the same in JAX and in PyTorch, step by step?

One checkpoint is checked with its own weights in the Flax and the PyTorch twin; two checkpoints
against each other, both in Flax. What differs first is run again to find out why.

Only this folder runs both frameworks; JAX is imported in the functions that run it.
"""

from vit_torch.verify.bounds import BOUNDS, HALF_PRECISION
from vit_torch.verify.definitions import Definitions, Setup
from vit_torch.verify.diagnose import Cause, diagnose, diagnose_pixels
from vit_torch.verify.parity import Stage, difference
from vit_torch.verify.results import Checked, Row, Verification
from vit_torch.verify.run import DTYPES, PRECISIONS, verify
from vit_torch.verify.stages import flax_stages, torch_stages
from vit_torch.verify.training import TrainingRow, verify_training

__all__ = [
    "BOUNDS",
    "DTYPES",
    "HALF_PRECISION",
    "PRECISIONS",
    "Cause",
    "Checked",
    "Definitions",
    "Row",
    "Setup",
    "Stage",
    "TrainingRow",
    "Verification",
    "diagnose",
    "diagnose_pixels",
    "difference",
    "flax_stages",
    "torch_stages",
    "verify",
    "verify_training",
]
