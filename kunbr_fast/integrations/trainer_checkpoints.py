"""A Trainer's checkpoints, as far as KUnBR reads them itself, and whether its model is a result."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec

from kunbr_fast.files.documents import checked, read_text
from kunbr_fast.files.shown import plain


def global_step(checkpoint: Path) -> int:
    path = checkpoint / "trainer_state.json"
    try:
        found = json.loads(read_text(path, 2**28))  # the Trainer's own file, in which a loss may be NaN
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{plain(path)}: not a whole checkpoint ({plain(error)}): give another one") from error
    return checked(found, TrainerState, plain(path))["global_step"]


class TrainerState(TypedDict):
    global_step: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


def last_checkpoint(directory: str) -> Path:
    """The last one that was written to its end."""
    numbered = [(folder.name.rpartition("-")[2], folder) for folder in Path(directory).glob("checkpoint-*")]
    for _, folder in sorted(((int(n), f) for n, f in numbered if n.isascii() and n.isdigit()), reverse=True):
        with contextlib.suppress(ValueError):
            global_step(folder)
            return folder
    raise ValueError(f"{directory} holds no whole checkpoint to resume from: leave resume_from_checkpoint out")


def check_resumable(checkpoint: Path) -> None:
    """ValueError for a checkpoint without the state of the training."""
    for name in ("optimizer.pt", "scheduler.pt"):
        if not (checkpoint / name).is_file():
            raise ValueError(
                f"{checkpoint} has no {name}, as with save_only_model=True: it cannot be resumed. Give another one as "
                "resume_from_checkpoint, or leave it out to begin anew, with save_only_model=False"
            )


class Result:
    """Whether the model in memory is what its last training was for."""

    def __init__(self) -> None:
        self._missing = ""  # why it is not

    @contextlib.contextmanager
    def awaited(self, steps: Callable[[], int]) -> Iterator[None]:
        """Around a training, which says when the result is `there`. steps: how many are done."""
        self._missing = "the training is not at its end"
        try:
            yield
        except BaseException as error:
            self._missing = f"the training ended in {type(error).__name__} after {steps()} steps: this is the original"
            raise

    def there(self) -> None:
        self._missing = ""

    @property
    def is_there(self) -> bool:
        return not self._missing

    def check(self, out: Any) -> None:
        """ValueError where it is not."""
        if self._missing:
            raise ValueError(
                f"{out}: {self._missing}, into which no block was inserted. train(resume_from_checkpoint=True) goes on "
                "from the last checkpoint (save_strategy, save_steps), train() begins anew: then save it"
            )
