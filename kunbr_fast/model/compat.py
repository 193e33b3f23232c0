"""What the package takes from transformers, and what differs between its releases. Loaded when it is first used (PEP 562).

The package is written for transformers 5, and its tests are. It also imports with 4.51.3, and trains there; and with
4.45.1 (torch 2.4.1), where all that runs packed samples is refused: the releases of OpenUnlearning's time, which
examples/open_unlearning.py was run with. Use `compat.NAME`: `from compat import NAME` loads transformers at once.
"""

from __future__ import annotations

from typing import Any

from packaging.version import Version

PACKED_SINCE = Version("4.51.3")  # the oldest release that packed samples were run with


def _load() -> dict[str, Any]:
    import transformers
    from transformers.activations import GELUActivation
    from transformers.pytorch_utils import Conv1D

    version = Version(transformers.__version__)
    found = {
        "Conv1D": Conv1D,
        "GELUActivation": GELUActivation,
        "VERSION": version,
        # decoder layers returned (hidden, ...) until 4.53, and the model took hold of the first
        "LAYERS_RETURN_TUPLES": version < Version("4.54"),
        "ALL_ATTENTION_FUNCTIONS": None,  # 4.45: a class of attention for each implementation
        "AttentionInterface": None,
        "ALL_EXPERTS_FUNCTIONS": None,  # 4.x: no stacked experts
        # whether gradient checkpointing is around a layer's forward (5.0), not in it; before 4.53 in the model's own loop
        "CALL_CHECKPOINTS": True,
    }
    try:
        from transformers import AttentionInterface
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        found |= {"AttentionInterface": AttentionInterface, "ALL_ATTENTION_FUNCTIONS": ALL_ATTENTION_FUNCTIONS}
    except ImportError:
        pass
    try:
        from transformers.activations import GELUTanh, SiLUActivation
    except ImportError:  # 4.x
        from torch.nn import SiLU as SiLUActivation
        from transformers.activations import PytorchGELUTanh as GELUTanh
    found |= {"GELUTanh": GELUTanh, "SiLUActivation": SiLUActivation}
    try:
        from transformers.modeling_layers import GradientCheckpointingLayer

        found["CALL_CHECKPOINTS"] = "__call__" in vars(GradientCheckpointingLayer)
    except ImportError:
        pass
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        found["ALL_EXPERTS_FUNCTIONS"] = ALL_EXPERTS_FUNCTIONS
    except ImportError:
        pass
    return found


def __getattr__(name: str) -> Any:
    if name.startswith("__") or "VERSION" in globals():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals().update(_load())
    if name not in globals():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]
