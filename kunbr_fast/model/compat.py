"""What differs between releases of transformers, in one place.

The package is written for transformers 5, and its tests are. It also imports with 4.51.3, and trains there; and with
4.45.1 (torch 2.4.1), where all that runs packed samples is refused: the releases of OpenUnlearning's time, which
examples/open_unlearning.py was run with.
"""

from __future__ import annotations

import transformers
from packaging.version import Version
from transformers.pytorch_utils import Conv1D

VERSION = Version(transformers.__version__)
PACKED_SINCE = Version("4.51.3")  # the oldest release that packed samples were run with

# Decoder layers returned (hidden, ...) until 4.53, and the model took hold of the first.
LAYERS_RETURN_TUPLES = VERSION < Version("4.54")

try:
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
except ImportError:  # 4.45: a class of attention for each implementation
    AttentionInterface, ALL_ATTENTION_FUNCTIONS = None, None

try:
    from transformers.activations import GELUTanh, SiLUActivation
except ImportError:  # 4.x
    from torch.nn import SiLU as SiLUActivation
    from transformers.activations import PytorchGELUTanh as GELUTanh

try:
    from transformers.modeling_layers import GradientCheckpointingLayer

    # transformers 5.0: around a layer's forward, not in it
    CALL_CHECKPOINTS = "__call__" in vars(GradientCheckpointingLayer)
except ImportError:  # the model's own loop over its layers does it
    CALL_CHECKPOINTS = True

try:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
except ImportError:  # 4.x: no stacked experts
    ALL_EXPERTS_FUNCTIONS = None

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_EXPERTS_FUNCTIONS",
    "CALL_CHECKPOINTS",
    "LAYERS_RETURN_TUPLES",
    "PACKED_SINCE",
    "VERSION",
    "AttentionInterface",
    "Conv1D",
    "GELUTanh",
    "SiLUActivation",
]
