"""How much a model still knows: four-choice accuracy, the RTT attack, plots and the report."""
