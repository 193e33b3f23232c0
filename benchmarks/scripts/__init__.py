"""Run by hand, in a checkout: `python benchmarks/scripts/NAME.py --help`. A wheel does not have them."""
