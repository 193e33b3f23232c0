"""The RTT attack (retraining on T): is the knowledge gone, or only hidden?

The facts of a forget set come in folds that say nothing about one another. For each fold, the unlearned model is
fine-tuned on the facts of all other folds and asked about this one. What it answers then was still in the weights. An
attack is only as strong as its settings: several learning rates are tried for several epochs, each on the same weights,
and the whole relearning curve is kept. The figure to report is the strongest attack found.

Source: Deeb and Roger, "Do Unlearning Methods Remove Information from Language Model Weights?", arXiv 2410.08827.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypedDict

import msgspec
from tqdm import tqdm

from kunbr_fast import data
from kunbr_fast.data.content import ALLOWANCES
from kunbr_fast.data.overlap import of_folds, settle
from kunbr_fast.data.text import say_separator
from kunbr_fast.evaluation.accuracy import Accuracy, measure, prepare_questions
from kunbr_fast.files.documents import checked
from kunbr_fast.files.shown import plain, shown
from kunbr_fast.files.tensors import WeightSnapshot
from kunbr_fast.model.ownership import differentiable, no_adapter
from kunbr_fast.model.vocabulary import check_tokens
from kunbr_fast.training.diverged import Diverged
from kunbr_fast.training.full import train_all
from kunbr_fast.values import ABOVE_ZERO, BATCH, EPOCHS, SEED, check, least

NAME = 40  # characters of a fold's name in messages and on the progress bar


@dataclass(frozen=True)
class RTTConfig:
    """Settings of the attack.

    lrs: learning rates, each a full attack of its own. epochs: passes over the training folds, measured after each.
    optimizer: "adamw" or "lion". target: which tokens are trained on (`data.encode`). scoring: "letter" or "choice"
    (`choice_accuracy`). seed: of the order of the data, the same for each fold and learning rate. text: how records
    become text. max_length: of a sample, in tokens (None: the model's limit). overlap: "error", or "allow" for a fact
    that is in two folds.
    """

    lrs: tuple[float, ...] = (5e-7, 1e-6, 5e-6, 1e-5)
    epochs: int = 5
    batch_size: int = 8
    optimizer: str = "adamw"
    target: str = "all"
    scoring: str = "letter"
    seed: int = 0
    text: data.TextSettings = data.TextSettings()
    max_length: int | None = None
    overlap: str = "error"

    def __post_init__(self) -> None:
        object.__setattr__(self, "lrs", tuple(check("lrs entry", lr, ABOVE_ZERO) for lr in self.lrs))
        if not self.lrs or len(set(self.lrs)) != len(self.lrs):
            raise ValueError(f"lrs={shown(self.lrs)}: expected one or more different learning rates above 0")
        for name, kind in (("epochs", EPOCHS), ("batch_size", BATCH), ("seed", SEED)):
            check(name, getattr(self, name), kind)
        if self.overlap not in ALLOWANCES:
            raise ValueError(f"overlap={shown(self.overlap)}: expected one of {', '.join(ALLOWANCES)}")


@dataclass(frozen=True)
class Fold:
    """One part of the forget set: the records that teach its facts, and the questions that ask for them."""

    name: str
    train_records: list[dict]
    questions: list[dict]


Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Point(TypedDict):
    """A point of a relearning curve."""

    fold: str
    lr: float
    epoch: Annotated[int, msgspec.Meta(ge=0, le=10**6)]
    plain: Share
    calibrated: Share | None


class Curves(TypedDict):
    curves: list[Point]


@dataclass(frozen=True)
class RTTResult:
    """Relearning curves: rows {"fold", "lr", "epoch", "plain", "calibrated"}, epoch 0 is before the attack.

    `calibrated` is None where the scoring has no such figure. ValueError unless every learning rate has every fold and
    epoch. A mean over folds counts each fold once.
    """

    curves: list[dict]

    def __post_init__(self) -> None:
        cells = {(row["fold"], row["lr"], row["epoch"]) for row in self.curves}
        folds = self._folds()
        epochs = max((row["epoch"] for row in self.curves), default=0)
        wanted = [(fold, lr, epoch) for lr in self.lrs for fold in folds for epoch in range(epochs + 1)]
        if epochs < 1 or len(cells) != len(self.curves) or cells != set(wanted):
            raise ValueError(
                f"relearning curves are not complete: got {len(self.curves)} rows, expected one for each of "
                f"{len(folds)} folds x {len(self.lrs)} learning rates x epochs 0..{max(epochs, 1)}"
            )

    def _folds(self) -> list[str]:
        return list(dict.fromkeys(row["fold"] for row in self.curves))

    @property
    def lrs(self) -> list[float]:
        """Learning rates, in the order they were tried."""
        return list(dict.fromkeys(row["lr"] for row in self.curves))

    def curve(self, lr: float, key: str = "plain") -> list[float] | None:
        """Mean accuracy over folds after epochs 0, 1, ... at this rate; None if `key` was not measured."""
        if lr not in self.lrs or key not in ("plain", "calibrated"):
            raise ValueError(f"no curve {key!r} at learning rate {lr}: there are plain, calibrated at {self.lrs}")
        if self.curves[0][key] is None:
            return None
        folds, cells = self._folds(), {(row["fold"], row["epoch"]): row[key] for row in self.curves if row["lr"] == lr}
        return [sum(cells[fold, epoch] for fold in folds) / len(folds) for epoch in range(len(cells) // len(folds))]

    @property
    def before(self) -> float:
        """Plain accuracy before the attack, mean over folds."""
        return self.curve(self.lrs[0])[0]

    @property
    def accuracy(self) -> float:
        """RTT accuracy, the strongest attack found: best mean over folds of any (lr, epoch >= 1)."""
        return self._best("plain")[0]

    @property
    def best(self) -> tuple[float, int]:
        """(lr, epoch) of the strongest attack; a tie goes to the rate tried first, then to the early epoch."""
        return self._best("plain")[1]

    @property
    def calibrated_accuracy(self) -> float | None:
        """The strongest attack by calibrated accuracy, None where that was not measured."""
        return None if self.curves[0]["calibrated"] is None else self._best("calibrated")[0]

    @property
    def recovery(self) -> float:
        """What the attack brought back: accuracy minus the accuracy before it."""
        return self.accuracy - self.before

    def _best(self, key: str) -> tuple[float, tuple[float, int]]:
        found = [(value, (lr, epoch)) for lr in self.lrs for epoch, value in enumerate(self.curve(lr, key)) if epoch]
        return max(found, key=lambda item: item[0])  # the first of equal ones

    def to_dict(self) -> dict:
        """JSON form: the summary for readers, and the curves, from which from_dict makes the result again."""
        lr, epoch = self.best
        return {
            "accuracy": self.accuracy,
            "calibrated_accuracy": self.calibrated_accuracy,
            "before": self.before,
            "recovery": self.recovery,
            "best": {"lr": lr, "epoch": epoch},
            "curves": [dict(row) for row in self.curves],
        }

    @classmethod
    def from_dict(cls, value: dict, where: str = "RTT result") -> "RTTResult":
        """The result that to_dict wrote; the summary is computed anew from the curves. ValueError, which begins with
        `where`, for values of other types."""
        return cls(checked(value, Curves, where)["curves"])


def rtt_attack(
    decoder,
    tokenizer,
    folds: Sequence[Fold],
    config: RTTConfig,
    snapshot_dir: str | Path,
    progress: bool = True,
    done: Sequence[dict] = (),
    on_result: Callable[[list[dict]], None] | None = None,
) -> RTTResult:
    """Fine-tune on all folds but one, ask about that one; for each fold and learning rate.

    decoder: of the unlearned model; its weights are bit for bit the same afterwards, also after an exception.
    snapshot_dir: where a copy of the weights lies meanwhile (the size of the model; removed at the end).
    done: rows of an earlier, interrupted run. A (fold, lr) whose rows are there is not attacked again; rows of folds or
    learning rates that are not asked for now are left out.
    on_result: called with the finished rows (epochs 0 to the last) of each (fold, lr), to be kept for `done`.

    Raises ValueError for fewer than two folds, folds of the same name, a fact in two of them, unusable records
    (`choice_accuracy`, `data.encode`), or `done` rows from a run with other epochs; FloatingPointError, naming fold and
    learning rate, if the fine-tuning diverges.
    """
    say_separator(config.text.separator, *(fold.train_records for fold in folds))
    return Attack(decoder, tokenizer, folds, config).run(snapshot_dir, progress, done, on_result)


class Attack:
    """`rtt_attack` in two steps: all is tokenised at once, so that a bad line does not turn up an hour later.

    say: told of an overlap that config allows.
    """

    def __init__(
        self,
        decoder,
        tokenizer,
        folds: Sequence[Fold],
        config: RTTConfig,
        say: Callable[[str], None] = lambda text: None,
    ):
        no_adapter(decoder.model, "the RTT attack")
        differentiable(decoder.model)
        _check_folds(folds)
        self.decoder, self.folds, self.config = decoder, folds, config
        self._questions = [
            prepare_questions(tokenizer, fold.questions, scoring=config.scoring, decoder=decoder) for fold in folds
        ]
        limit = least(config.max_length, decoder.max_positions)
        self._samples = []
        for fold in folds:
            part, names, _ = data.encode_named(fold.train_records, tokenizer, config.target, limit, text=config.text)
            check_tokens(decoder.model, part, [f"fold {plain(fold.name, NAME)}, {name}" for name in names])
            self._samples.append(part)
        settle(overlap_of(folds), config.overlap, say)
        self._before: dict[int, Accuracy] = {}  # each fold's, where it is known

    def run(
        self,
        snapshot_dir: str | Path,
        progress: bool = True,
        done: Sequence[dict] = (),
        on_result: Callable[[list[dict]], None] | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> RTTResult | None:
        """As `rtt_attack`. share: (i, n), only every n-th of the unfinished attacks, from the i-th on; then None,
        unless these are all."""
        folds, config = self.folds, self.config
        finished = finished_attacks(done or (), folds, config)
        left = [(i, lr) for i in range(len(folds)) for lr in config.lrs if (folds[i].name, lr) not in finished]
        mine = left[share[0] :: share[1]]
        bar = tqdm(
            total=(len(finished) + len(mine)) * config.epochs,
            initial=len(finished) * config.epochs,
            desc="RTT attack",
            unit="epoch",
            disable=not progress or not mine,
        )
        with contextlib.ExitStack() as stack:
            stack.callback(bar.close)
            if mine:
                restore = stack.enter_context(_snapshot(self.decoder.model, Path(snapshot_dir)))
            for i, lr in mine:
                rows = self._one(i, lr, restore, bar)
                finished[folds[i].name, lr] = rows
                if on_result is not None:
                    on_result([dict(row) for row in rows])
        if len(mine) < len(left):
            return None
        return RTTResult([row for fold in folds for lr in config.lrs for row in finished[fold.name, lr]])

    def _one(self, i: int, lr: float, restore: Callable[[], None], bar: tqdm) -> list[dict]:
        """The rows of one fold's attack at one learning rate; `restore` puts the weights back."""
        fold, config, questions = self.folds[i], self.config, self._questions[i]
        bar.set_postfix_str(f"{plain(fold.name, NAME)}, lr {lr:g}")
        if i not in self._before:
            self._before[i] = measure(self.decoder, questions)
        rows = [_row(fold, lr, 0, self._before[i])]

        def after_epoch(_epoch: int) -> None:
            accuracy = measure(self.decoder, questions)
            rows.append(_row(fold, lr, len(rows), accuracy))
            bar.set_postfix_str(f"{plain(fold.name, NAME)}, lr {lr:g}, {accuracy.plain:.1%}", refresh=False)
            bar.update()

        others = [sample for k, part in enumerate(self._samples) if k != i for sample in part]
        how = {name: getattr(config, name) for name in ("epochs", "batch_size", "optimizer", "seed")}
        try:
            train_all(self.decoder, others, lr=lr, **how, on_epoch=after_epoch, progress=None)
        except (Diverged, FloatingPointError) as error:
            # Diverged's own hint is about gradient difference, which is not what runs here.
            what = f"diverged at {error.where}" if isinstance(error, Diverged) else str(error)
            raise FloatingPointError(
                f"RTT attack on fold {plain(fold.name, NAME)} at learning rate {lr:g}: {what}. Take this learning rate "
                "out of the list; finished attacks need not be run again"
            ) from error
        finally:
            restore()
        return rows


@contextlib.contextmanager
def _snapshot(model, directory: Path) -> Iterator[Callable[[], None]]:
    """A copy of the weights on disk. Yields a function that puts them back; if it fails the file stays, the only good
    copy."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "rtt-weights.safetensors"
    snapshot = WeightSnapshot.save(model, path)
    intact = True

    def restore() -> None:
        nonlocal intact
        intact = False
        snapshot.restore(model)
        intact = True

    try:
        yield restore
    finally:
        if intact:
            path.unlink(missing_ok=True)


def _row(fold: Fold, lr: float, epoch: int, accuracy: Accuracy) -> dict:
    return dict(fold=fold.name, lr=lr, epoch=epoch, plain=accuracy.plain, calibrated=accuracy.calibrated)


def overlap_of(folds: Sequence[Fold], attack: bool = True) -> str | None:
    """What to tell where folds say something about one another, else None. attack: as of `of_folds`."""
    return of_folds(((fold.name, [*fold.train_records, *fold.questions]) for fold in folds), attack)


def _check_folds(folds: Sequence[Fold]) -> None:
    names = [fold.name for fold in folds]
    if len(folds) < 2:
        raise ValueError(
            f"got {len(folds)} fold, expected at least two: the attack trains on the other folds and asks "
            "about one. Give the forget set as several files of independent facts"
        )
    if len(set(names)) != len(names):
        raise ValueError(f"fold names {shown(names, 200)} are not all different; rename the files")
    for fold in folds:
        for what in ("train_records", "questions"):
            if not getattr(fold, what):
                raise ValueError(f"fold {plain(fold.name, NAME)}: {what} is empty")


def finished_attacks(
    done: Sequence[dict], folds: Sequence[Fold], config: RTTConfig, where: str = ""
) -> dict[tuple[str, float], list[dict]]:
    """Rows of an earlier run by (fold, lr), each curve whole, or ValueError, which begins with `where`."""
    wanted = {(fold.name, lr) for fold in folds for lr in config.lrs}
    finished: dict[tuple[str, float], list[dict]] = {}
    for row in done:
        if (row["fold"], row["lr"]) in wanted:
            finished.setdefault((row["fold"], row["lr"]), []).append(dict(row))
    for (fold, lr), rows in finished.items():
        rows.sort(key=lambda row: row["epoch"])
        epochs = [row["epoch"] for row in rows]
        what = f"{where}the earlier result of fold {shown(fold)} at learning rate {lr:g}"
        cure = "resume with the same settings, or start without the earlier results"
        if epochs != list(range(config.epochs + 1)):
            raise ValueError(f"{what} has the epochs {shown(epochs)}, expected 0 to {config.epochs}; {cure}")
        if any((row["calibrated"] is None) != (config.scoring == "choice") for row in rows):
            raise ValueError(f"{what} was not scored by {config.scoring}; {cure}")
    return finished
