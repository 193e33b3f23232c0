"""The RTT attack (retraining on T): is the knowledge gone, or only hidden?

The facts of a forget set come in folds that say nothing about one another. For each fold, the unlearned model is
fine-tuned on the facts of all other folds and asked about this one. What it answers then was still in the weights. An
attack is only as strong as its settings: several learning rates are tried for several epochs, each on the same weights,
and the whole relearning curve is kept. Other kinds of attack (`attacks`) have curves of their own. The figure to report
is the strongest attack found.

Source: Deeb and Roger, "Do Unlearning Methods Remove Information from Language Model Weights?", arXiv 2410.08827.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from kunbr_fast import data
from kunbr_fast.data.content import ALLOWANCES
from kunbr_fast.data.overlap import facts, of_folds, overlap, settle
from kunbr_fast.data.text import say_separator
from kunbr_fast.evaluation.accuracy import Accuracy, measure, prepare_questions
from kunbr_fast.evaluation.attacks import ATTACKS, chosen_attacks, round_weights
from kunbr_fast.evaluation.curves import RTTResult, attack_of
from kunbr_fast.evaluation.lora import train_lora
from kunbr_fast.files.checksums import checksum
from kunbr_fast.files.shown import plain, shown
from kunbr_fast.files.tensors import WeightSnapshot
from kunbr_fast.model.ownership import differentiable, no_adapter
from kunbr_fast.model.vocabulary import check_tokens
from kunbr_fast.model.weights import weights_of
from kunbr_fast.parallel.group import ALONE, Group
from kunbr_fast.parallel.sharded import sharded
from kunbr_fast.training.diverged import Diverged
from kunbr_fast.training.fine_tune import train_all
from kunbr_fast.values import BATCH, EPOCHS, SEED, check, least, rates

NAME = 40  # characters of a fold's name in messages and on the progress bar


@dataclass(frozen=True)
class RTTConfig:
    """Settings of the attack.

    lrs: learning rates, each a full attack of its own. epochs: passes over the training folds, measured after each.
    optimizer: "adamw" or "lion". target: which tokens are trained on (`data.encode`). scoring: "letter" or "choice"
    (`choice_accuracy`). seed: of the order of the data, the same for each fold and learning rate. text: how records
    become text. max_length: of a sample, in tokens (None: the model's limit). overlap: "error", or "allow" for a fact
    that is in two folds. attacks: kinds of attack, of `attacks.ATTACKS`, or "all".
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
    attacks: tuple[str, ...] = ("full",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "attacks", chosen_attacks(self.attacks))
        object.__setattr__(self, "lrs", rates(tuple(self.lrs), "lrs"))
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


class AttackDiverged(FloatingPointError):
    """An attack's own training diverged, not the model's answers before it."""


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
    """Fine-tune on all folds but one, ask about that one; for each kind of attack, fold and learning rate. (The attack
    `other_facts` needs those: see `Attack`.)

    decoder: of the unlearned model; its weights are bit for bit the same afterwards, also after an exception.
    snapshot_dir: where a copy of the weights lies meanwhile (the size of the model; removed at the end).
    done: rows of an earlier, interrupted run. An (attack, fold, lr) whose rows are there is not made again; rows of
    what is not asked for now are left out.
    on_result: called with the finished rows (epochs 0 to the last) of each (attack, fold, lr), to be kept for `done`.

    Raises ValueError for fewer than two folds, folds of the same name, a fact in two of them, unusable records
    (`choice_accuracy`, `data.encode`), or `done` rows from a run with other epochs; `AttackDiverged`, naming fold and
    learning rate, if the fine-tuning of the attack `full` diverges. Another one's divergence is in the result, and the
    rest goes on.
    """
    say_separator(config.text.separator, *(fold.train_records for fold in folds))
    return Attack(decoder, tokenizer, folds, config).run(snapshot_dir, progress, done, on_result)


class Attack:
    """`rtt_attack` in two steps: all is tokenised at once, so that a bad line does not turn up an hour later.

    say: told of an overlap that config allows, and of attacks that diverged. other_facts: records, or samples, of the
    attack of that name: of the folds' form, with none of their facts.
    """

    def __init__(
        self,
        decoder,
        tokenizer,
        folds: Sequence[Fold],
        config: RTTConfig,
        say: Callable[[str], None] = lambda text: None,
        other_facts: Sequence[Mapping] = (),
    ):
        no_adapter(decoder.model, "the RTT attack")
        differentiable(decoder.model)
        _check_folds(folds)
        self.decoder, self.folds, self.config = decoder, folds, config
        self._questions = [
            prepare_questions(tokenizer, fold.questions, scoring=config.scoring, decoder=decoder) for fold in folds
        ]
        limit = least(config.max_length, decoder.max_positions)

        def encoded(records: Sequence[Mapping], whose: str) -> list[data.Sample]:
            part, names, _ = data.encode_named(records, tokenizer, config.target, limit, text=config.text)
            check_tokens(decoder.model, part, [f"{whose}, {name}" for name in names])
            return part

        self._samples = [encoded(fold.train_records, f"fold {plain(fold.name, NAME)}") for fold in folds]
        settle(overlap_of(folds), config.overlap, say)
        self._others: Sequence[data.Sample] = ()
        if any(ATTACKS[attack].others for attack in config.attacks):
            settle(taught_of(folds, other_facts), config.overlap, say)
            is_text = data.is_record(other_facts[0])
            self._others = encoded(other_facts, "other facts") if is_text else data.as_samples(other_facts)
        self._before: dict[int, Accuracy] = {}  # each fold's, where it is known
        self._say = say

    def run(
        self,
        snapshot_dir: str | Path,
        progress: bool = True,
        done: Sequence[dict] = (),
        on_result: Callable[[list[dict]], None] | None = None,
        share: tuple[int, int] = (0, 1),
        ranks: Group = ALONE,
    ) -> RTTResult | None:
        """As `rtt_attack`. share: (i, n), only every n-th of the unfinished attacks, from the i-th on; then None,
        unless these are all. ranks: make each attack that trains all weights together, with the model in parts
        (`parallel.sharded`); the others are left."""
        folds, config = self.folds, self.config
        finished = finished_attacks(done or (), folds, config)

        def begun(job: _Job) -> bool:
            return any((job.attack, folds[i].name, job.lr) not in finished for i in job.folds)

        jobs = [(begun(job), job) for job in _jobs(config, len(folds))]
        left = [job for unfinished, job in jobs if unfinished]
        mine = left[share[0] :: share[1]]
        if ranks.size > 1:
            mine = [job for job in mine if ATTACKS[job.attack].trains_all]
        had = sum(job.points(config) for unfinished, job in jobs if not unfinished)
        bar = tqdm(
            total=had + sum(job.points(config) for job in mine),
            initial=had,
            desc="RTT attack",
            unit="epoch",
            disable=not progress or not mine,
        )
        with contextlib.ExitStack() as stack:
            stack.callback(bar.close)
            if mine and ranks.size > 1:
                restore = stack.enter_context(_in_parts(self.decoder, Path(snapshot_dir), ranks))
            elif mine:
                restore = stack.enter_context(_snapshot(self.decoder.model, Path(snapshot_dir)))
            for job in mine:
                for i, rows in self._one(job, restore, bar).items():
                    if finished.setdefault((job.attack, folds[i].name, job.lr), rows) is rows and on_result is not None:
                        on_result([dict(row) for row in rows])
        if len(mine) < len(left):
            return None
        return _result(finished, [(job.attack, folds[i].name, job.lr) for _, job in jobs for i in job.folds])

    def _one(self, job: "_Job", restore: Callable[[], None], bar: tqdm) -> dict[int, list[dict]]:
        """The rows of an attack, by fold; `restore` puts the weights back."""
        config, kind = self.config, ATTACKS[job.attack]
        name = f"{job.attack} " * (config.attacks != ("full",))
        name += "all folds" if len(job.folds) > 1 else plain(self.folds[job.folds[0]].name, NAME)
        name += f", lr {job.lr:g}" * (job.lr > 0)
        bar.set_postfix_str(name)
        for i in job.folds:
            if i not in self._before:
                self._before[i] = measure(self.decoder, self._questions[i])
        rows = {i: [_row(job, self.folds[i], 0, self._before[i])] for i in job.folds}

        def after_epoch(epoch: int) -> None:
            if epoch not in kind.measured(config.epochs):
                return
            for i in job.folds:
                rows[i].append(_row(job, self.folds[i], epoch, measure(self.decoder, self._questions[i])))
            accuracy = sum(found[-1]["plain"] for found in rows.values()) / len(rows)
            bar.set_postfix_str(f"{name}, {accuracy:.1%}", refresh=False)
            bar.update()

        try:
            self._attack(job, after_epoch)
        except (Diverged, FloatingPointError) as error:
            # Diverged's own hint is about gradient difference, which is not what runs here.
            what = f"diverged at {error.where}" if isinstance(error, Diverged) else str(error)
            if job.attack != "full":
                self._say(f"RTT attack {name}: {what}; there is no curve of it, the other attacks go on")
                return {i: [{**found[0], "diverged": True}] for i, found in rows.items()}
            fold = plain(self.folds[job.folds[0]].name, NAME)
            raise AttackDiverged(
                f"RTT attack on fold {fold} at learning rate {job.lr:g}: {what}. Take this learning rate "
                "out of the list; finished attacks need not be run again"
            ) from error
        finally:
            restore()
        return rows

    def _attack(self, job: "_Job", after_epoch: Callable[[int], None]) -> None:
        config, kind = self.config, ATTACKS[job.attack]
        if kind.rounds is not None:
            round_weights(self.decoder, kind.rounds)
            after_epoch(1)
            return
        samples = [sample for k, part in enumerate(self._samples) if k not in job.folds for sample in part]
        samples = self._others if kind.others else samples
        how = dict(lr=job.lr, epochs=kind.passes * config.epochs, batch_size=config.batch_size, seed=config.seed)
        if kind.adapters:
            train_lora(self.decoder, samples, **how, on_epoch=after_epoch)
        else:
            optimizer = kind.optimizer or config.optimizer
            train_all(self.decoder, samples, optimizer=optimizer, **how, on_epoch=after_epoch, progress=None)


class _Job(NamedTuple):
    """One attack, on one fold or (`Kind.at_once`) on all."""

    attack: str
    folds: tuple[int, ...]
    lr: float

    def points(self, config: RTTConfig) -> int:
        return len(ATTACKS[self.attack].measured(config.epochs)) - 1


def _jobs(config: RTTConfig, folds: int) -> list[_Job]:
    """All attacks, in order."""
    return [
        _Job(attack, chosen, lr)
        for attack in config.attacks
        for chosen in ([tuple(range(folds))] if ATTACKS[attack].at_once else [(i,) for i in range(folds)])
        for lr in ATTACKS[attack].lrs(config.lrs)
    ]


def _result(finished: dict[tuple[str, str, float], list[dict]], wanted: Sequence[tuple[str, str, float]]) -> RTTResult:
    rows = [row for key in wanted for row in finished[key]]
    if all(row.get("diverged") for row in rows):
        raise AttackDiverged(
            f"RTT attack: every attack diverged ({', '.join(dict.fromkeys(attack for attack, _, _ in wanted))}): take "
            "lower learning rates"
        )
    return RTTResult(rows)


@contextlib.contextmanager
def _snapshot(model, directory: Path) -> Iterator[Callable[[], None]]:
    """A copy of the weights on disk, of a streamed model what changes alone. Yields a function that puts them back; if
    it fails the file stays, the only good copy."""
    directory.mkdir(parents=True, exist_ok=True)
    if (weights := weights_of(model)).streamed:
        with weights.writable(directory) as restore:
            yield restore
        return
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


@contextlib.contextmanager
def _in_parts(decoder, directory: Path, ranks: Group) -> Iterator[Callable[[], None]]:
    """`_snapshot`, by rank 0 for all, with the model in parts, of which each rank puts back its own."""
    path = directory / "rtt-weights.safetensors"
    if ranks.first:
        directory.mkdir(parents=True, exist_ok=True)
        WeightSnapshot.save(decoder.model, path)
    ranks.wait()
    snapshot = WeightSnapshot(path, ranks.gather(checksum(path) if ranks.first else None)[0])
    with sharded(decoder.model, decoder.layers, ranks, snapshot) as shards:
        yield lambda: shards.take(snapshot)
    if ranks.first:
        path.unlink(missing_ok=True)


def _row(job: _Job, fold: Fold, epoch: int, found: Accuracy) -> dict:
    of = dict(attack=job.attack, fold=fold.name, lr=job.lr, epoch=epoch)
    names = "plain calibrated num_questions smooth smooth_error leak pool".split()
    return of | {name: getattr(found, name) for name in names}


def overlap_of(folds: Sequence[Fold], attack: bool = True) -> str | None:
    """What to tell where folds say something about one another, else None. attack: as of `of_folds`."""
    return of_folds(((fold.name, [*fold.train_records, *fold.questions]) for fold in folds), attack)


def taught_of(folds: Sequence[Fold], other_facts: Sequence[Mapping]) -> str | None:
    """What to tell where a fold's fact is among the other facts, else None. ValueError where there are no others."""
    if not other_facts:
        raise ValueError(
            "the attack other_facts has nothing to teach: give facts of the folds' form that are not in them "
            "(--other-facts, a retain set), or leave it out of the attacks"
        )
    asked = [record for fold in folds for record in (*fold.train_records, *fold.questions)]
    sides = facts({"fold record": asked}), facts({"other fact": other_facts})
    return overlap(sides, "in a fold and in the other facts: the attack would teach what it asks about")


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
) -> dict[tuple[str, str, float], list[dict]]:
    """Rows of an earlier run by (attack, fold, lr), each curve whole, or ValueError, which begins with `where`."""
    wanted = {(job.attack, folds[i].name, job.lr) for job in _jobs(config, len(folds)) for i in job.folds}
    finished: dict[tuple[str, str, float], list[dict]] = {}
    for row in done:
        if (key := (attack_of(row), row["fold"], row["lr"])) in wanted:
            finished.setdefault(key, []).append(dict(row))
    for (attack, fold, lr), rows in finished.items():
        rows.sort(key=lambda row: row["epoch"])
        epochs, asked = [row["epoch"] for row in rows], ATTACKS[attack].measured(config.epochs)
        kind = f" under {attack}" * (attack != "full")
        what = f"{where}the earlier result of fold {shown(fold)}{kind} at learning rate {lr:g}"
        cure = "resume with the same settings, or start without the earlier results"
        if epochs != list(asked) and not (epochs == [0] and rows[0].get("diverged")):
            steps = f" in steps of {asked.step}" * (asked.step > 1)
            raise ValueError(f"{what} has the epochs {shown(epochs)}, expected 0 to {asked[-1]}{steps}; {cure}")
        if any((row["calibrated"] is None) != (config.scoring == "choice") for row in rows):
            raise ValueError(f"{what} was not scored by {config.scoring}; {cure}")
    return finished
