"""What a run is given: its models and data, and where and with whom it works."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kunbr_fast.data.content import EQUAL
from kunbr_fast.evaluation.folds import Fold
from kunbr_fast.parallel.group import ALONE, Group
from kunbr_fast.run.log import RunLog
from kunbr_fast.run.reporter import Reporter
from kunbr_fast.stopping import Stop


@dataclasses.dataclass(frozen=True)
class RunInputs:
    """Models and data. questions: {"forget": records, "retain": records}, for accuracy; folds: of the attack."""

    model: nn.Module
    forget: Sequence[Mapping]
    retain: Sequence[Mapping]
    tokenizer: Any = None
    unlearned: nn.Module | Mapping[str, torch.Tensor] | None = None
    questions: Mapping[str, Sequence[Mapping]] = dataclasses.field(default_factory=dict)
    folds: Sequence[Fold] = ()

    def allowing_equal_choices(self) -> RunInputs:
        """The same, whose questions may have equal choices, wherever they come from."""

        def of(records: Sequence[Mapping]) -> Sequence[Mapping]:
            return [{**r, EQUAL: True} if isinstance(r, Mapping) and "choices" in r else r for r in records]

        folds = [Fold(fold.name, of(fold.train_records), of(fold.questions)) for fold in self.folds]
        questions = {what: of(asked) for what, asked in self.questions.items()}
        data = {"forget": of(self.forget), "retain": of(self.retain)}
        return dataclasses.replace(self, **data, questions=questions, folds=folds)


@dataclasses.dataclass(frozen=True)
class RunContext:
    """Where a run keeps its state, which processes share it, and what it tells.

    group: the ranks that divide the work. writes, wait: of the state, see `RunState`. stop: a request to end early.
    log: of the steps.
    """

    work: Path
    group: Group = ALONE
    reporter: Reporter = dataclasses.field(default_factory=Reporter)
    resume: bool = False
    writes: bool = True
    wait: Callable[[], None] = ALONE.wait
    stop: Stop = dataclasses.field(default_factory=Stop)
    log: RunLog = dataclasses.field(default_factory=RunLog)
