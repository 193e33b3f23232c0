"""kunbr_fast: fast re-insertion unlearning (KUnBR, arXiv 2511.11667) for Hugging Face causal language models."""

from kunbr_fast.data import encode, load_records
from kunbr_fast.density.attribution import Attribution, attribute
from kunbr_fast.density.measure import Density, knowledge_density
from kunbr_fast.density.select import pareto_front, select_blocks
from kunbr_fast.files.merge import merge_models
from kunbr_fast.model.blocks import partition
from kunbr_fast.model.patch import patched
from kunbr_fast.model.prefix_cache import PrefixCache
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.unlearn import unlearn
from kunbr_fast.training.diverged import Diverged
from kunbr_fast.training.reinserted import reinserted
from kunbr_fast.version import __version__

__all__ = [
    "__version__",
    "Attribution",
    "Density",
    "Diverged",
    "KUnBRConfig",
    "PrefixCache",
    "attribute",
    "encode",
    "knowledge_density",
    "load_records",
    "merge_models",
    "pareto_front",
    "partition",
    "patched",
    "reinserted",
    "select_blocks",
    "unlearn",
]
