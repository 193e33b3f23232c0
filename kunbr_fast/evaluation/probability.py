"""The probability of an answer: the figure for data without choices, prompt and completion, chats and text lines.

Of a record whose answer has n tokens it is exp(mean of log p(token | all before it)) = p(answer | prompt)^(1/n), as
TOFU has it (Maini et al., arXiv 2401.06121): the geometric mean of the tokens' probabilities, 0..1. The answer is the
completion, the assistant's turns, or of a text line the whole line. A line that was cut into pieces counts once.

Nothing is sampled. Samples go through the model in packed batches, and the head runs at the answer's tokens alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from kunbr_fast.data import PackedBatch, Sample, TextSettings, encode_named, pack, token_batches
from kunbr_fast.data.text import PLAIN
from kunbr_fast.evaluation.significance import standard_error
from kunbr_fast.files.shown import plain
from kunbr_fast.memory import Place, is_out_of_memory, release
from kunbr_fast.model.decoder import Stretch
from kunbr_fast.model.frozen import evaluating
from kunbr_fast.model.vocabulary import check_tokens
from kunbr_fast.objectives.distributions import linear_nll
from kunbr_fast.parallel.sharded import MARK as SHARDS
from kunbr_fast.values import least

BATCH_TOKENS = 4096
MOST = {"retain": 1000}  # records of a set that are measured: so many say enough, and there may be any number


@dataclass(frozen=True)
class Probability:
    """values: of each record, 0..1. standard_error: over records, None of one."""

    values: list[float]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def standard_error(self) -> float | None:
        return standard_error(self.values)

    def row(self) -> dict[str, Any]:
        """As a relearning curve's `Point` has it."""
        found = {"metric": "probability", "plain": self.mean, "calibrated": None, "num_questions": len(self.values)}
        return found | {"error": self.standard_error}


@dataclass(frozen=True)
class Answers:
    """Tokenised records (`prepare_answers`): all that stays the same between two measurements. owners: the record of
    each sample, a number; names: of the samples."""

    samples: list[Sample]
    owners: list[int]
    names: list[str]

    @property
    def num_records(self) -> int:
        return self.owners[-1] + 1


def prepare_answers(
    tokenizer: Any,
    records: Sequence[Mapping],
    *,
    decoder,
    text: TextSettings = PLAIN,
    max_length: int | None = None,
    most: int | None = None,
) -> Answers:
    """Records, no questions, of which the answer has labels. most: of more records so many, spread evenly. ValueError
    as of `data.encode`."""
    named = spread([{"_where": f"record {i}", **record} for i, record in enumerate(records)], most)
    limit, made = least(max_length, decoder.max_positions), []
    for is_text, target in ((True, "all"), (False, "answer")):  # a text line is all answer
        if mine := [i for i, record in enumerate(named) if ("text" in record) == is_text]:
            found = encode_named([named[i] for i in mine], tokenizer, target, limit, text=text)
            made += [(mine[owner], sample, name) for sample, name, owner in zip(*found)]
    made.sort(key=lambda one: one[0])
    owners, samples, names = map(list, zip(*made))
    check_tokens(decoder.model, samples, names)
    return Answers(samples, owners, names)


def spread(items: Sequence[Any], most: int | None) -> list[Any]:
    """At most so many of them, spread evenly; None: all."""
    number = least(most, len(items))
    return [items[i * len(items) // number] for i in range(number)]


def answer_probabilities(
    decoder,
    asked: Mapping[str, Answers],
    *,
    impl: str = "auto",
    place: Place | None = None,
    progress: str | None = None,
) -> dict[str, Probability]:
    """Of several sets by name. A streamed model reads each layer once for all of them, with the bits of one in memory;
    place: where its activations wait. progress: label of a progress bar. Where memory runs out all is begun again, with
    half the tokens at a time.

    Raises FloatingPointError where the model's answer is not finite."""
    samples = [sample for answers in asked.values() for sample in answers.samples]
    if not samples:
        return {}
    lengths, tokens = [len(sample["input_ids"]) for sample in samples], BATCH_TOKENS
    while True:
        try:
            sums, counts = _sums(decoder, samples, token_batches(lengths, tokens), impl, place, progress)
            break
        except Exception as error:
            # of a model in parts the other processes go on with the next layer: none of them may begin again alone
            if not is_out_of_memory(error) or tokens <= max(lengths) or hasattr(decoder.model, SHARDS):
                raise
        release()
        tokens //= 2
    names = [name for answers in asked.values() for name in answers.names]
    for name, value in zip(names, sums.tolist()):
        if not value < float("inf"):
            raise FloatingPointError(
                f"the model's answer to {plain(name)} has a loss of {value}, no finite number: its weights have "
                "diverged; use a lower learning rate or an earlier checkpoint"
            )
    found, first = {}, 0
    for name, answers in asked.items():
        own = slice(first, first := first + len(answers.samples))
        found[name] = Probability(_by_record(answers, sums[own], counts[own]))
    return found


def _by_record(answers: Answers, sums: torch.Tensor, counts: torch.Tensor) -> list[float]:
    """The pieces of a record together; index_add_ on the CPU adds in their order."""
    owners = torch.tensor(answers.owners)
    nll, tokens = (
        torch.zeros(answers.num_records, dtype=torch.float64).index_add_(0, owners, x) for x in (sums, counts)
    )
    return torch.exp(-nll / tokens).tolist()


def _sums(
    decoder, samples: Sequence[Sample], groups: list[list[int]], impl: str, place: Place | None, progress: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sample's NLL summed over its labelled tokens, and how many these are; float64 on the CPU."""
    sums, counts = torch.zeros(2, len(samples), dtype=torch.float64)
    last = decoder.num_layers - 1
    batches = (pack([samples[i] for i in group]).to(decoder.device) for group in groups)
    bar = tqdm(total=len(groups), desc=progress, unit="batch", leave=False, disable=progress is None)
    with evaluating(decoder.model), torch.no_grad(), bar:
        for number, batch, _, stretch in decoder.forward_to(batches, [last], place):
            for i, nll in zip(groups[number], _nll(decoder, batch, stretch, impl).split(batch.row_counts)):
                sums[i], counts[i] = nll.sum(), len(nll)
            bar.update()
    return sums, counts


def _nll(decoder, batch: PackedBatch, stretch: Stretch, impl: str) -> torch.Tensor:
    hidden = decoder.final(decoder.run(batch, stretch, rows=True))
    return linear_nll(hidden, decoder.head, batch.targets, impl=impl).double().cpu()
