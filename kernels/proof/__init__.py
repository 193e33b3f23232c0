"""Proof that a kernel is right, and faster than torch, on the GPU at hand: what `impl="auto"` goes by.

cases     what is proven: kinds of launches, and the calls that show one right or fast
gate      whether a kind is right, and why not
clock     how fast it is beside torch
child     both, in a process of its own, as a kernel may hang or break the device
prove     runs these processes; what they find are verdicts (verdicts.py, beside this package)
"""
