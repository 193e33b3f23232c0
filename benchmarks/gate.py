"""Whether a kernel is right by the table that the proof and the tests go by, before a benchmark runs it."""

import functools

import torch

from kunbr_fast.kernels.proof import cases, gate


@functools.cache
def why_wrong(
    operation: str, impl: str, dtype: torch.dtype, device: torch.device, kinds: tuple[str, ...] = ()
) -> str | None:
    """What the table's cases show wrong of `impl` on a GPU, None for nothing; found out once in a process.

    kinds: of launch, where an operation has several, that matter; (): all. None on a CPU, where kernels are
    interpreted, and for torch and fp64, which the table does not have.
    """
    if device.type != "cuda":
        return None
    name = cases.named(dtype)
    wanted = dict(operations=[operation], impls=[impl], dtypes=[] if name is None else [name])
    for target in cases.targets(device, **wanted):
        if target.dtype == name and (not kinds or target.kind in ("all", *kinds)):  # an optimiser's are fp32 too
            why = gate.judge(cases.kind_of(target), dtype, device).why
            if why is not None:
                return f"{target}: {why}"
    return None
