"""Runs `kunbr-fast unlearn` in this process and kills it (SIGKILL) at a chosen point. Usage: POINT ARGS...

Nothing in the package knows of this: the point is a function of it, wrapped so that its n-th call never happens.
"""

import os
import signal
import sys

import torch

from kunbr_fast.cli import command as cli
from kunbr_fast.evaluation import rtt
from kunbr_fast.files import models as loading
from kunbr_fast.files import weight_files
from kunbr_fast.run import state as checkpoint
from kunbr_fast.training import block as reinsertion
from kunbr_fast.training import full as training
from kunbr_fast.training import streamed_full

# point: (where, name of the function, how many calls pass)
POINTS = {
    "in the warm-up": (training.FullTraining, "step_packed", 3),
    "a checkpoint is written, state.json is not": (checkpoint, "write_sealed", 4),
    "in the first block": (reinsertion.BlockTraining, "step_packed", 3),
    "in the second block": (reinsertion.BlockTraining, "step_packed", 7),
    "a block is trained, nothing of it is recorded": (checkpoint.RunState, "finish", 5),
    "in the attack": (rtt, "measure_all", 2),
    "the model is half saved": (loading.os, "replace", None),
}
# points that only a streamed run, or one of several processes, comes to
STREAMED = {
    "a shard of the result is written": (weight_files, "_write", 1),
    "in the warm-up, half of the layers updated": (streamed_full.StreamedFullTraining, "_leave", 20),
}
RANKED = {"rank 1, in its block": (reinsertion.BlockTraining, "step_packed", 2)}
OF_RANK = {"rank 1, in its block": "1"}


def main():
    point, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    owner, name, passes = (POINTS | STREAMED | RANKED)[point]
    real, calls = getattr(owner, name), 0

    def wrapped(*args, **kwargs):
        nonlocal calls
        if passes is None:  # the second file that is moved out of the scratch directory of save_model
            calls += ".saving-" in str(args[0])
            if calls == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        else:
            calls += 1
            if calls > passes:
                os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    if point not in OF_RANK or os.environ["RANK"] == OF_RANK[point]:
        setattr(owner, name, wrapped)
    sys.exit(cli.main(arguments))


if __name__ == "__main__":
    main()
