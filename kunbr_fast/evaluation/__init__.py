"""How much a model still knows: four-choice accuracy, the RTT attack, plots and the report."""

from kunbr_fast.evaluation.accuracy import Accuracy, choice_accuracy, letter_tokens
from kunbr_fast.evaluation.plots import plot_density, plot_relearning
from kunbr_fast.evaluation.report import table, write_report
from kunbr_fast.evaluation.rtt import Fold, RTTConfig, RTTResult, rtt_attack

__all__ = [
    "Accuracy",
    "Fold",
    "RTTConfig",
    "RTTResult",
    "choice_accuracy",
    "letter_tokens",
    "plot_density",
    "plot_relearning",
    "rtt_attack",
    "table",
    "write_report",
]
