"""A run's samples: made from what the user gives, and handed to trainings as packed batches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kunbr_fast.data import PackedBatch, Sample, check_labels, check_lengths, encode_named, is_record, with_alternates
from kunbr_fast.data.overlap import fact_of, facts, of_sides
from kunbr_fast.data.records import say_unused_alternates
from kunbr_fast.data.schedule import Schedule
from kunbr_fast.files.shown import shown
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.vocabulary import check_tokens
from kunbr_fast.objectives.batch import WHOLE, Shares, StepBatch
from kunbr_fast.objectives.criterion import Criterion
from kunbr_fast.objectives.original import OriginalValues
from kunbr_fast.parallel.group import ALONE, Group
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.context import RunInputs
from kunbr_fast.training.training import relearned_batch
from kunbr_fast.values import least


def entries(data: Any, what: str) -> list[Any]:
    """A set as a list of records, samples or batches. One batch is a set too, and a loader is read once.

    ValueError for what is none."""
    if isinstance(data, Mapping):
        return [data]
    no_set = isinstance(data, (str, bytes, Path)) or not isinstance(data, Iterable)
    found = [data] if no_set else list(data)
    for entry in found:  # a list of files' names, too
        if no_set or isinstance(entry, (str, bytes, Path)):
            cure = ": load_records reads files" if isinstance(entry, (str, Path)) else ""
            raise ValueError(f"the {what} set: got {shown(entry)}, expected records, samples or batches{cure}")
    return found


def to_samples(
    data: Sequence[Mapping],
    tokenizer: Any,
    config: KUnBRConfig,
    decoder: Decoder,
    what: str,
    alternate: str | None = None,
) -> list[Sample]:
    """Records (tokenised once), samples or padded batches as samples that the model can take. alternate: the kind of
    second answer that each must bring, as in `encode`; samples and batches hold it themselves."""
    return _made(data, tokenizer, config, decoder, what, alternate)[0]


def with_facts(
    data: Sequence[Mapping],
    tokenizer: Any,
    config: KUnBRConfig,
    decoder: Decoder,
    what: str,
    alternate: str | None = None,
) -> tuple[list[Sample], list[int]]:
    """`to_samples`, and the number of the fact that each is about (`overlap.fact_of`); of tokens that differ each its
    own."""
    samples, owners = _made(data, tokenizer, config, decoder, what, alternate)
    if owners is None:
        known: list[Hashable] = [tuple(sample["input_ids"].tolist()) for sample in samples]
    else:
        known = [fact_of(data[i]) for i in owners]
    numbers: dict[Hashable, int] = {}
    return samples, [numbers.setdefault(fact, len(numbers)) for fact in known]


def _made(
    data: Sequence[Mapping], tokenizer: Any, config: KUnBRConfig, decoder: Decoder, what: str, alternate: str | None
) -> tuple[list[Sample], list[int] | None]:
    """The samples, and of which record each is."""
    if not data:
        raise ValueError(f"the {what} set is empty: expected at least one record")
    for i, item in enumerate(data):
        if not isinstance(item, Mapping) or is_record(item) != is_record(data[0]):
            raise ValueError(
                f"the {what} set: entry {i} is {shown(item)}, the first {shown(data[0])}: expected records, or samples "
                "and batches, not both"
            )
    if alternate is None or (alternate != "given" and is_record(data[0])):
        say_unused_alternates(data, what)
    limit, owners = least(config.max_length, decoder.max_positions), None
    if not is_record(data[0]):
        samples = _tokenized(data, limit, what, alternate, config.objective)
        names = [f"{what} sample {i}" for i in range(len(samples))]
    elif tokenizer is None:
        raise ValueError(f"the {what} set holds records, not tokens: give tokenizer=")
    else:
        how = config.target, limit, alternate, config.seed, config.text()
        samples, names, owners = encode_named(data, tokenizer, *how)
    check_tokens(decoder.model, samples, names)
    if alternate is not None:
        check_tokens(
            decoder.model, [sample["alternate"] for sample in samples], [f"the alternate of {n}" for n in names]
        )
    return samples, owners


def overlap(inputs: RunInputs, forget: Sequence[Sample], retain: Sequence[Sample]) -> str | None:
    """What to tell where the same fact is to be forgotten and kept, in records or in questions, else None. forget,
    retain: the samples made of the inputs, which are compared by their tokens where one side has no text."""
    given = {"forget": (inputs.forget, forget), "retain": (inputs.retain, retain)}
    text, sides = all(is_record(data[0]) for data, _ in given.values()), []
    for what, (data, samples) in given.items():
        parts = {f"{what} record": data} if is_record(data[0]) else {}
        parts |= {} if text else {f"{what} sample": samples}
        sides.append(facts({**parts, f"{what} question": inputs.questions.get(what, ())}))
    return of_sides(*sides)


def _tokenized(
    data: Sequence[Mapping], limit: int | None, what: str, alternate: str | None, objective: str
) -> list[Sample]:
    """Samples or padded batches, checked."""
    try:
        samples, others = with_alternates(data)
    except ValueError as error:
        raise ValueError(f"the {what} set: {error}") from error
    names = [f"{what} sample {i}" for i in range(len(samples))]
    check_lengths(samples, limit, names)
    check_labels(samples, names)
    if alternate is None:
        return samples
    if others is None:
        raise ValueError(
            f"the {what} set has no alternates, which {objective} needs ({alternate}): give records, or samples "
            'with a second sample under "alternate"'
        )
    names = [f"the alternate of {name}" for name in names]
    check_lengths(others, limit, names)
    check_labels(others, names)
    return [{**sample, "alternate": other} for sample, other in zip(samples, others)]


@dataclasses.dataclass(frozen=True)
class Samples:
    """What a run trains on. alternates: in the order of `forget`, or none. facts: of each forget sample, where an
    adversary needs them. Places count in `all`."""

    forget: list[Sample]
    retain: list[Sample]
    alternates: list[Sample] = dataclasses.field(default_factory=list)
    facts: list[int] | None = None

    @functools.cached_property
    def all(self) -> list[Sample]:
        return self.forget + self.retain + self.alternates

    @property
    def parts(self) -> dict[str, list[Sample]]:
        return {"forget": self.forget, "retain": self.retain, "alternate": self.alternates}

    def read_by(self, criterion: Criterion) -> list[Sample]:
        """The samples that steps on this criterion read: the first ones of `all`."""
        if criterion.alternate is not None:
            return self.all
        return self.forget + self.retain if criterion.objective.retain else self.forget

    def places(self, criterion: Criterion, forget: Sequence[int], retain: Sequence[int]) -> list[int]:
        """The places of a step's samples, in the order in which the criterion takes them."""
        first = len(self.forget)
        alternates = [first + len(self.retain) + i for i in forget] if criterion.alternate is not None else []
        return [*forget, *alternates, *(first + i for i in retain if criterion.objective.retain)]


@dataclasses.dataclass(frozen=True)
class Feed:
    """Gives a training its batches.

    packed: makes a batch of samples by their places. team: the processes that share each step; home: the rank that has
    each forget and retain sample, or None: each rank takes an equal part of the step's.
    """

    samples: Samples
    criterion: Criterion
    packed: Callable[[list[int]], PackedBatch]
    original: OriginalValues
    team: Group = ALONE
    home: list[int] | None = None

    def mine(self, forget: list[int], retain: list[int]) -> tuple[list[int], list[int]]:
        """This rank's samples of a step."""
        rank, size = self.team.rank, self.team.size
        if size == 1:
            return forget, retain
        if self.home is None:
            return share(forget, rank, size), share(retain, rank, size)
        first = len(self.samples.forget)
        return [i for i in forget if self.home[i] == rank], [i for i in retain if self.home[first + i] == rank]

    def places(self, forget: list[int], retain: list[int]) -> list[int]:
        return self.samples.places(self.criterion, *self.mine(forget, retain))

    def part(self, mine: Sequence[list[int]], whole: Sequence[list[int]]) -> StepBatch | None:
        """The batch of some samples of a step, with their share of `whole`, all of its forget and retain samples; None
        where the criterion reads none of them."""
        if not self.samples.places(self.criterion, *mine):
            return None
        return self.batch(*mine, Shares(*(len(part) / len(samples) for part, samples in zip(mine, whole))))

    def stand_in(self) -> StepBatch:
        """A sample of this rank's, which has one that the criterion reads, for a pass that counts nothing."""
        first, own = len(self.samples.forget), self.home.index(self.team.rank)
        return self.batch(*(([own], []) if own < first else ([], [own - first])))

    def relearned(self, mine: list[int], whole: int) -> StepBatch | None:
        """Forget samples that an adversary relearns, a part of a batch of `whole`; None of none."""
        return relearned_batch(self.packed(mine), shares=Shares(0.0, len(mine) / whole)) if mine else None

    def reads(self, schedule: Schedule) -> Iterator[list[int]]:
        """The samples of each batch that `packed` will be asked for in the steps of a schedule, by their places."""
        for number in range(len(schedule)):
            yield from (mine for batch in schedule.relearned(number) if (mine := self.mine(batch, [])[0]))
            yield self.places(*schedule[number])

    def batch(self, forget: list[int], retain: list[int], shares: Shares = WHOLE) -> StepBatch:
        """The batch of a step, or of a part of one."""
        places = self.samples.places(self.criterion, forget, retain)
        return self.criterion.step_batch(self.packed(places), len(forget), self.original.batch(places), shares)


def share(items: list[int], part: int, parts: int) -> list[int]:
    """One of `parts` equal parts, as far as they go."""
    return items[part * len(items) // parts : (part + 1) * len(items) // parts]
