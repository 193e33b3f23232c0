"""kunbr_fast: fast re-insertion unlearning (KUnBR, arXiv 2511.11667) for Hugging Face causal language models.

`import kunbr_fast` is free: each public name is imported from its module when it is first used (PEP 562).
"""

import importlib
from typing import TYPE_CHECKING, Any

from kunbr_fast.version import __version__

if TYPE_CHECKING:  # for editors and type checkers: what HOMES says
    from kunbr_fast.data import encode, load_records
    from kunbr_fast.data.published import load_items
    from kunbr_fast.density.attribution import Attribution, attribute
    from kunbr_fast.density.measure import Density, knowledge_density
    from kunbr_fast.density.select import pareto_front, select_blocks
    from kunbr_fast.files.merge import merge_models
    from kunbr_fast.measures.evaluate import evaluate
    from kunbr_fast.model.blocks import partition
    from kunbr_fast.model.patch import patched
    from kunbr_fast.model.prefix_cache import PrefixCache
    from kunbr_fast.run.config import KUnBRConfig
    from kunbr_fast.run.unlearn import unlearn
    from kunbr_fast.stopping import Stop, Stopped
    from kunbr_fast.training.diverged import Diverged
    from kunbr_fast.training.reinserted import reinserted

__all__ = [
    "__version__",
    "Attribution",
    "Density",
    "Diverged",
    "KUnBRConfig",
    "PrefixCache",
    "Stop",
    "Stopped",
    "attribute",
    "encode",
    "evaluate",
    "knowledge_density",
    "load_items",
    "load_records",
    "merge_models",
    "pareto_front",
    "partition",
    "patched",
    "reinserted",
    "select_blocks",
    "unlearn",
]

HOMES = {
    "data": "encode load_records",
    "data.published": "load_items",
    "density.attribution": "Attribution attribute",
    "density.measure": "Density knowledge_density",
    "density.select": "pareto_front select_blocks",
    "files.merge": "merge_models",
    "measures.evaluate": "evaluate",
    "model.blocks": "partition",
    "model.patch": "patched",
    "model.prefix_cache": "PrefixCache",
    "run.config": "KUnBRConfig",
    "run.unlearn": "unlearn",
    "stopping": "Stop Stopped",
    "training.diverged": "Diverged",
    "training.reinserted": "reinserted",
}
_HOME = {name: f"kunbr_fast.{module}" for module, names in HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
