"""The suites of `kunbr-fast bench`, one module each: a docstring, whose first line is its help, and `cases(options)`."""

SUITES = ("density", "linear_loss", "norms", "optimizer", "cover_layer", "step", "end_to_end")
