"""Launches each kernel that this machine can run, once, on small inputs: what compute-sanitizer looks at.

    compute-sanitizer --tool memcheck --error-exitcode 9 python benchmarks/scripts/launch_each.py

The inputs are the first case of each kind of launch in the table that the proof goes by; results are not looked at.
"""

import sys

import torch

from kunbr_fast.kernels.proof import cases


def main() -> int:
    device, failed = torch.device("cuda"), 0
    for target in cases.targets(device, dtypes=("bf16",)):
        kind = cases.kind_of(target)
        try:
            inputs = kind.cases[0].draw(cases.DTYPES[target.dtype])
            kind.cases[0].run(target.impl, {name: tensor.to(device) for name, tensor in inputs.items()})
            torch.cuda.synchronize()
        except RuntimeError as error:  # the others are still to be looked at, where the device takes more
            failed = 1
            print(f"{target}: {error}", flush=True)
        else:
            print(f"{target}: launched", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
