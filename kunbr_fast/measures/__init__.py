"""The measures that people publish: what a model knows, remembers, gives away and has lost."""

UNFINISHED = "kunbr-evaluation"  # the folder of what an evaluation has found so far, see `store`
