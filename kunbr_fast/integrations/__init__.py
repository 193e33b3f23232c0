"""kunbr_fast under other pipelines. The package imports none of it.

hf_trainer          Hugging Face's Trainer; with driven_stages (our stages, led by its loop) and trainer_*
open_unlearning     OpenUnlearning's launcher; with open_unlearning_*, labelled_rows (a model's forward that makes no
                    more than a loss reads) and savings (what that saved)
deep_unl            the authors' script; with recognise (what their loss is) and padded_pass
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("KUnBRTrainer", "KUnBRMixin"):
        from kunbr_fast.integrations import hf_trainer

        return getattr(hf_trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
