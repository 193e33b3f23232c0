"""kunbr_fast: fast re-insertion unlearning (KUnBR, arXiv 2511.11667) for Hugging Face causal language models."""

from kunbr_fast.attribution import Attribution, attribute
from kunbr_fast.blocks import pareto_front, partition, select_blocks
from kunbr_fast.config import KUnBRConfig
from kunbr_fast.data import encode, load_records
from kunbr_fast.density import Density, knowledge_density
from kunbr_fast.merge import merge_models
from kunbr_fast.patch import patched
from kunbr_fast.prefix_cache import PrefixCache
from kunbr_fast.reinsertion import reinserted
from kunbr_fast.training import Diverged
from kunbr_fast.unlearn import unlearn
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
