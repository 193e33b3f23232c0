"""kunbr_fast under other pipelines: each module replaces one import of theirs, and none is imported by the package."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("KUnBRTrainer", "KUnBRMixin"):
        from kunbr_fast.integrations import hf_trainer

        return getattr(hf_trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
