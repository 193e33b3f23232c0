"""What differs between releases of transformers, and what we need of it, in one place.

The package is written for transformers 5, and its tests are. It also imports with 4.51.3, and trains there; and with
4.45.1 (torch 2.4.1), where all that runs packed samples is refused: the releases of OpenUnlearning's time, which
examples/open_unlearning.py was run with.

transformers takes seconds to import: the names in FOUND are looked up when one of them is first used, as `compat.NAME`.
"""

from __future__ import annotations

from typing import Any

from packaging.version import Version

PACKED_SINCE = Version("4.51.3")  # the oldest release that packed samples were run with
FOUND = (
    "VERSION",
    "LAYERS_RETURN_TUPLES",  # decoder layers returned (hidden, ...) until 4.53, and the model took hold of the first
    "CALL_CHECKPOINTS",  # whether recomputing is around a layer's forward (transformers 5.0, and the model's own loop)
    "ALL_ATTENTION_FUNCTIONS",  # None in 4.45: a class of attention for each implementation
    "ALL_EXPERTS_FUNCTIONS",  # None in 4.x: no stacked experts
    "AttentionInterface",  # None in 4.45
    "Conv1D",
    "GELUActivation",
    "GELUTanh",
    "SiLUActivation",
)


def __getattr__(name: str) -> Any:
    if name not in FOUND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals().update(_find())
    return globals()[name]


def _find() -> dict[str, Any]:
    """The value of each name in FOUND."""
    import transformers
    from transformers.activations import GELUActivation
    from transformers.pytorch_utils import Conv1D

    version = Version(transformers.__version__)
    try:
        from transformers import AttentionInterface
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    except ImportError:
        AttentionInterface, ALL_ATTENTION_FUNCTIONS = None, None
    try:
        from transformers.activations import GELUTanh, SiLUActivation
    except ImportError:  # 4.x
        from torch.nn import SiLU as SiLUActivation
        from transformers.activations import PytorchGELUTanh as GELUTanh
    try:
        from transformers.modeling_layers import GradientCheckpointingLayer

        checkpoints = "__call__" in vars(GradientCheckpointingLayer)
    except ImportError:
        checkpoints = True
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        ALL_EXPERTS_FUNCTIONS = None
    values = (version, version < Version("4.54"), checkpoints, ALL_ATTENTION_FUNCTIONS, ALL_EXPERTS_FUNCTIONS)
    values += (AttentionInterface, Conv1D, GELUActivation, GELUTanh, SiLUActivation)
    return dict(zip(FOUND, values))
