"""What differs between releases of transformers, and what we need of it, in one place.

The package is written for transformers 5, and its tests are. It also imports with 4.51.3, and trains there; and with
4.45.1 (torch 2.4.1), where all that runs packed samples is refused: the releases of OpenUnlearning's time, which
examples/open_unlearning.py was run with.

transformers takes seconds to import: the names in `_find` are looked up when one of them is first used, as
`compat.NAME`.
"""

from __future__ import annotations

from typing import Any

from packaging.version import Version

PACKED_SINCE = Version("4.51.3")  # the oldest release that packed samples were run with


def __getattr__(name: str) -> Any:
    if name[0].isupper():
        globals().update(_find())
    if name not in globals():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]


def _find() -> dict[str, Any]:
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
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError:
        AttentionMaskInterface = None
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
    return dict(
        VERSION=version,
        LAYERS_RETURN_TUPLES=version < Version("4.54"),  # until then a model took the first of what its layers gave
        CALL_CHECKPOINTS=checkpoints,  # whether recomputing is around a layer's forward (5.0, and the model's own loop)
        ALL_ATTENTION_FUNCTIONS=ALL_ATTENTION_FUNCTIONS,  # None in 4.45: a class of attention for each implementation
        ALL_EXPERTS_FUNCTIONS=ALL_EXPERTS_FUNCTIONS,  # None in 4.x: no stacked experts
        AttentionInterface=AttentionInterface,  # None in 4.45
        AttentionMaskInterface=AttentionMaskInterface,  # None before 4.53: masks are made in each model
        Conv1D=Conv1D,
        GELUActivation=GELUActivation,
        GELUTanh=GELUTanh,
        SiLUActivation=SiLUActivation,
    )
