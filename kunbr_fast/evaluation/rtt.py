"""The RTT attack (retraining on T): is the knowledge gone, or only hidden?

The facts of a forget set come in folds that say nothing about one another. For each fold, the unlearned model is
fine-tuned on the facts of all other folds and asked about this one. What it answers then was still in the weights. An
attack is only as strong as its settings: several learning rates are tried for several epochs, each on the same weights,
and the whole relearning curve is kept. Other kinds of attack (`attacks`) have curves of their own. The figure to report
is the strongest attack found.

Source: Deeb and Roger, "Do Unlearning Methods Remove Information from Language Model Weights?", arXiv 2410.08827.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from kunbr_fast import data
from kunbr_fast.data.content import ALLOWANCES
from kunbr_fast.data.overlap import settle
from kunbr_fast.data.text import say_separator
from kunbr_fast.evaluation.accuracy import Accuracy, measure_all, prepare_questions
from kunbr_fast.evaluation.attacks import ATTACKS, chosen_attacks, rounded
from kunbr_fast.evaluation.curves import RTTResult, attack_of
from kunbr_fast.evaluation.examples import answers_at, places_in
from kunbr_fast.evaluation.folds import NAME, Fold, check_folds, metric_of, overlap_of, taught_of
from kunbr_fast.evaluation.lora import Lora, chosen_targets, train_lora
from kunbr_fast.evaluation.probability import Probability, answer_probabilities, prepare_answers
from kunbr_fast.evaluation.significance import change_error
from kunbr_fast.files.checksums import checksum
from kunbr_fast.files.shown import plain, shown
from kunbr_fast.files.tensors import WeightSnapshot
from kunbr_fast.memory import Place
from kunbr_fast.model.ownership import differentiable, no_adapter
from kunbr_fast.model.vocabulary import check_tokens
from kunbr_fast.model.weights import weights_of
from kunbr_fast.parallel.group import ALONE, Group
from kunbr_fast.parallel.sharded import sharded
from kunbr_fast.training.diverged import Diverged
from kunbr_fast.training.fine_tune import train_all
from kunbr_fast.training.settings import check_master_weights
from kunbr_fast.values import BATCH, COUNT, EPOCHS, SEED, check, least, rates

BAR = "{l_bar}{bar}| {n:.4g}/{total} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"  # parts of an epoch count


@dataclass(frozen=True)
class RTTConfig:
    """Settings of the attack.

    lrs: learning rates, each a full attack of its own. epochs: passes over the training folds, measured after each.
    optimizer: "adamw" or "lion". target: which tokens are trained on (`data.encode`). scoring: "letter" or "choice"
    (`choice_accuracy`). seed: of the order of the data, the same for each fold and learning rate. text: how records
    become text. max_length: of a sample, in tokens (None: the model's limit). overlap: "error", or "allow" for a fact
    that is in two folds. attacks: kinds of attack, of `attacks.ATTACKS`, or "all". lora_rank, lora_targets: of the
    attack `lora`, see `lora.Lora`; PEFT's alpha is twice the rank. master_weights: of attacks that train all weights,
    as of `FullSettings`: of a half-precision model "none" rounds most updates of a low rate away, and such an attack
    finds nothing.
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
    lora_rank: int = Lora.rank
    lora_targets: tuple[str, ...] = Lora.targets
    master_weights: str = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "attacks", chosen_attacks(self.attacks))
        object.__setattr__(self, "lora_targets", chosen_targets(self.lora_targets))
        check_master_weights(self.master_weights, name="master_weights")
        object.__setattr__(self, "lrs", rates(tuple(self.lrs), "lrs"))
        for name, kind in (("epochs", EPOCHS), ("batch_size", BATCH), ("seed", SEED), ("lora_rank", COUNT)):
            check(name, getattr(self, name), kind)
        if self.overlap not in ALLOWANCES:
            raise ValueError(f"overlap={shown(self.overlap)}: expected one of {', '.join(ALLOWANCES)}")


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
    snapshot_dir: where a copy of the weights lies meanwhile (the size of the model; removed at the end). Of a streamed
    model there is no copy: what was trained lies there, weights and optimiser state, where it does not fit main memory.
    done: rows of an earlier, interrupted run. An (attack, fold, lr) whose rows are there is not made again; rows of
    what is not asked for now are left out.
    on_result: called with the finished rows (epochs 0 to the last) of each (attack, fold, lr), to be kept for `done`.

    Raises ValueError for fewer than two folds, folds of the same name, of which some alone have questions, or with a
    fact in two of them, unusable records (`choice_accuracy`, `data.encode`), or `done` rows from a run with other
    epochs; `AttackDiverged`, naming fold and learning rate, if the fine-tuning of the attack `full` diverges. Another
    one's divergence is in the result, and the rest goes on.
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
        check_master_weights(config.master_weights, decoder.dtype, "rtt_master_weights")
        differentiable(decoder.model)
        check_folds(folds)
        self.decoder, self.folds, self.config = decoder, folds, config
        self._lora = Lora(config.lora_rank, config.lora_targets)
        self._by_probability = metric_of(folds) == "probability"
        if self._by_probability:
            how = dict(decoder=decoder, text=config.text, max_length=config.max_length)
            self._asked = [prepare_answers(tokenizer, fold.train_records, **how) for fold in folds]
        else:
            how = dict(scoring=config.scoring, decoder=decoder)
            self._asked = [prepare_questions(tokenizer, fold.questions, **how) for fold in folds]
        limit = least(config.max_length, decoder.max_positions)

        def encoded(records: Sequence[Mapping], whose: str) -> list[data.Sample]:
            part, names, _ = data.encode_named(records, tokenizer, config.target, limit, text=config.text)
            check_tokens(decoder.model, part, [f"{whose}, {name}" for name in names])
            return part

        if any(ATTACKS[attack].adapters for attack in config.attacks):
            self._lora.linears(decoder)  # for its error
        self._samples = [encoded(fold.train_records, f"fold {plain(fold.name, NAME)}") for fold in folds]
        settle(overlap_of(folds), config.overlap, say)
        self._others: Sequence[data.Sample] = ()
        if any(ATTACKS[attack].others for attack in config.attacks):
            settle(taught_of(folds, other_facts), config.overlap, say)
            is_text = data.is_record(other_facts[0])
            self._others = encoded(other_facts, "other facts") if is_text else data.as_samples(other_facts)
        self._examples = places_in(folds)
        self._before: dict[int, Accuracy | Probability] = {}  # each fold's, where it is known
        self._place, self._say = Place(), say
        self._asking: str | None = None  # title of the questions' own bar

    def run(
        self,
        snapshot_dir: str | Path,
        progress: bool = True,
        done: Sequence[dict] = (),
        on_result: Callable[[list[dict]], None] | None = None,
        share: tuple[int, int] = (0, 1),
        ranks: Group = ALONE,
        place: Place | None = None,
    ) -> RTTResult | None:
        """As `rtt_attack`. share: (i, n), only every n-th of the unfinished attacks, from the i-th on; then None,
        unless these are all. ranks: make each attack that trains all weights together, with the model in parts
        (`parallel.sharded`); the others are left. place: where a streamed model's activations wait between two layers
        (default: main memory, or a file in snapshot_dir)."""
        folds, config, directory = self.folds, self.config, Path(snapshot_dir)
        finished = finished_attacks(done or (), folds, config)

        def begun(job: _Job) -> bool:
            return any((job.attack, folds[i].name, job.lr) not in finished for i in job.folds)

        jobs = [(begun(job), job) for job in _jobs(config, len(folds))]
        left = [job for unfinished, job in jobs if unfinished]
        mine = left[share[0] :: share[1]]
        if ranks.size > 1:
            mine = [job for job in mine if ATTACKS[job.attack].trains_all]
        had = sum(job.points(config) for unfinished, job in jobs if not unfinished)
        self._place = place or Place(directory=directory)
        self._asking = "questions" if progress and self.decoder.streamed else None
        total = had + sum(job.points(config) for job in mine)
        with _bar(total, had, progress and bool(mine)) as bar:
            self._measure_before(mine)
            for changes, some in itertools.groupby(mine, self._changes_weights):
                with self._restorable(changes, directory, ranks) as restore:
                    for job in some:
                        for i, rows in self._one(job, restore, bar).items():
                            key = job.attack, folds[i].name, job.lr
                            if finished.setdefault(key, rows) is rows and on_result is not None:
                                on_result([dict(row) for row in rows])
        if len(mine) < len(left):
            return None
        return _result(finished, [(job.attack, folds[i].name, job.lr) for _, job in jobs for i in job.folds])

    def _changes_weights(self, job: "_Job") -> bool:
        """Whether an attack leaves other weights behind. A streamed model has adapters, and rounded weights, only as
        long as the attack goes on."""
        return not self.decoder.streamed or ATTACKS[job.attack].trains_all

    @contextlib.contextmanager
    def _restorable(self, changes: bool, directory: Path, ranks: Group) -> Iterator[Callable[[], None]]:
        """Inside, attacks may change the weights (if they do). Yields a function that puts them back, as does
        leaving."""
        if not changes:
            yield lambda: None
        elif ranks.size > 1:
            with _in_parts(self.decoder, directory, ranks) as restore:
                yield restore
        else:
            with _snapshot(self.decoder.model, directory) as restore:
                yield restore

    def _measure(self, folds: Iterable[int]) -> dict[int, Accuracy | Probability]:
        """A streamed model reads each layer once for all of the folds."""
        names = {i: self.folds[i].name for i in folds}
        asked = {name: self._asked[i] for i, name in names.items()}
        measure = answer_probabilities if self._by_probability else measure_all
        found = measure(self.decoder, asked, place=self._place, progress=self._asking)
        return {i: found[name] for i, name in names.items()}

    def _measure_before(self, jobs: Sequence["_Job"]) -> None:
        self._before |= self._measure(sorted({i for job in jobs for i in job.folds} - self._before.keys()))

    def _one(self, job: "_Job", restore: Callable[[], None], bar: tqdm) -> dict[int, list[dict]]:
        """The rows of an attack, by fold; `restore` puts the weights back. The bar counts parts of an epoch."""
        config, kind = self.config, ATTACKS[job.attack]
        name = f"{job.attack} " * (config.attacks != ("full",))
        name += "all folds" if len(job.folds) > 1 else plain(self.folds[job.folds[0]].name, NAME)
        name += f", lr {job.lr:g}" * (job.lr > 0)
        bar.set_postfix_str(name)
        rows = {i: [self._row(job, i, 0, self._before[i])] for i in job.folds}
        begun = round(bar.n)

        def up_to(point: float) -> None:
            bar.update(begun + point - bar.n)

        def after_epoch(epoch: int) -> None:
            if epoch not in kind.measured(config.epochs):
                return
            measured = self._measure(job.folds)
            for i, found in measured.items():
                change = change_error(self._before[i].values, found.values)
                rows[i].append(self._row(job, i, epoch, found) | {"change_error": change})
            values = [value for found in measured.values() for value in found.values]
            bar.set_postfix_str(f"{name}, {sum(values) / len(values):.1%}", refresh=False)
            up_to(epoch / kind.passes)

        try:
            self._attack(job, after_epoch, up_to)
        except (Diverged, FloatingPointError) as error:
            # Diverged's own hint is about gradient difference, which is not what runs here.
            what = f"diverged at {error.where}" if isinstance(error, Diverged) else str(error)
            if job.attack != "full":
                self._say(f"RTT attack {name}: {what}; there is no curve of it, the other attacks go on")
                up_to(job.points(config))
                return {i: [{**found[0], "diverged": True}] for i, found in rows.items()}
            fold = plain(self.folds[job.folds[0]].name, NAME)
            raise AttackDiverged(
                f"RTT attack on fold {fold} at learning rate {job.lr:g}: {what}. Take this learning rate "
                "out of the list; finished attacks need not be run again"
            ) from error
        finally:
            restore()
        return rows

    def _row(self, job: "_Job", fold: int, epoch: int, found: Accuracy | Probability) -> dict:
        row = dict(attack=job.attack, fold=self.folds[fold].name, lr=job.lr, epoch=epoch) | found.row()
        places = self._examples[fold]
        return row | ({"answers": answers_at(found, places)} if places else {})

    def _attack(self, job: "_Job", after_epoch: Callable[[int], None], up_to: Callable[[float], None]) -> None:
        """up_to: is told how much is done, in epochs that are given."""
        config, kind = self.config, ATTACKS[job.attack]
        if kind.rounds is not None:
            with rounded(self.decoder, kind.rounds):
                after_epoch(1)
            return
        samples = [sample for k, part in enumerate(self._samples) if k not in job.folds for sample in part]
        samples = self._others if kind.others else samples
        how = dict(lr=job.lr, epochs=kind.passes * config.epochs, batch_size=config.batch_size, seed=config.seed)
        steps, count = kind.passes * -(-len(samples) // config.batch_size), itertools.count(1)
        how |= dict(place=self._place, on_epoch=after_epoch, on_step=lambda metrics: up_to(next(count) / steps))
        if kind.adapters:
            train_lora(self.decoder, samples, lora=self._lora, **how)
        else:
            how |= dict(master_weights=config.master_weights, rounding_seed=config.seed)
            train_all(self.decoder, samples, optimizer=kind.optimizer or config.optimizer, **how)


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


def _bar(total: int, had: int, shown: bool) -> tqdm:
    """smoothing: epochs differ by attack, and questions are between them: the mean tells when it ends."""
    how = dict(unit="epoch", bar_format=BAR, smoothing=0, disable=not shown)
    return tqdm(total=total, initial=had, desc="RTT attack", **how)


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
        metric = metric_of(folds)
        if any(row.get("metric", "accuracy") != metric for row in rows):
            raise ValueError(f"{what} is not of {metric}; {cure}")
        if metric == "accuracy" and any((row["calibrated"] is None) != (config.scoring == "choice") for row in rows):
            raise ValueError(f"{what} was not scored by {config.scoring}; {cure}")
    return finished
