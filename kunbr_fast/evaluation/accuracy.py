"""Multiple-choice accuracy by likelihood: which of the choices does the model hold most probable?

Two scorings of the same question lines ({"question", "choices", "answer"}, usually four choices):

letter   The RTT evaluation's own form. The prompt is data.question_prompt(record), which ends in "Answer:"; the
         next-token logits of " A" " B" " C" " D" are compared. The calibrated accuracy subtracts each letter's mean
         logit over the question set first, for models that prefer a letter.
choice   For models too small to know what a letter stands for. sum_t log p(choice token t | question, earlier choice
         tokens) of the text question + " " + choice, for each choice. The sum is not divided by the number of tokens:
         choices of very different lengths favour the short one.

Questions go through the model in packed batches, each once for all its choices (`reading`). Logits are made at the
rows that are compared alone: one a question for `letter`, the choices' tokens for `choice`. Nothing is sampled and a
tie goes to the first choice, so two measurements of the same weights are equal.

For `choice` two more figures come from the likelihoods: the smooth accuracy, expected over random distractors, which is
far less noisy, and what sampled answers give away (`candidates`). For `letter` the choices stand in the prompt.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from kunbr_fast import data
from kunbr_fast.data.content import is_blank
from kunbr_fast.data.tokens import check_repeatable, tokens, twice
from kunbr_fast.evaluation.candidates import Candidates, find_candidates, leak
from kunbr_fast.evaluation.reading import Reading, Rows, read_all
from kunbr_fast.evaluation.significance import standard_error
from kunbr_fast.files.shown import plain, shown
from kunbr_fast.memory import Place
from kunbr_fast.model.vocabulary import check_vocabulary

SCORINGS = ("letter", "choice")


@dataclass(frozen=True)
class Accuracy:
    """Share of questions answered correctly.

    plain: 0..1. calibrated: 0..1 after each letter's mean logit was subtracted, None for scoring="choice" (a choice's
    text does not hold its position). predictions: the plain answers, 0 for the first choice, in the records' order.
    For scoring="choice", else None: smooth: the expected plain accuracy over random distractors, smooth_error: its
    standard error over questions (None for one question). leak: 0..1, share of the questions whose answer is among k
    sampled ones, for each k of `candidates.SAMPLES`. pool: of how many candidates one would guess (harmonic mean over
    questions). values: of each question 1 where it is answered correctly, else 0.
    """

    plain: float
    calibrated: float | None
    predictions: list[int]
    num_questions: int
    smooth: float | None = None
    smooth_error: float | None = None
    leak: list[float] | None = None
    pool: float | None = None
    values: list[int] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """As a relearning curve's `Point` has it."""
        names = "plain calibrated num_questions smooth smooth_error leak pool".split()
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict:
        """The fields as JSON takes them."""
        return asdict(self)


@dataclass(frozen=True)
class Questions:
    """Tokenised questions (`prepare_questions`): all that stays the same between two measurements.

    sequences: for each question what the model reads: one prompt ("letter"), or one text a choice ("choice"; without
    its last token, after which nothing is asked). targets: for each of these texts the (position, token) pairs whose
    log-probabilities are summed, empty for "letter". letters: the answer tokens, None for "choice". answers: index of
    the right choice. num_choices: of each question. candidates: of each question, None for "letter".
    """

    sequences: list[list[list[int]]]
    targets: list[list[list[tuple[int, int]]]]
    letters: list[int] | None
    answers: list[int]
    num_choices: list[int]
    candidates: list[Candidates] | None = None


def choice_accuracy(
    decoder,
    tokenizer,
    records: Sequence[dict],
    *,
    scoring: str = "letter",
    place: Place | None = None,
    progress: str | None = None,
) -> Accuracy:
    """Multiple-choice accuracy of decoder.model on question records.

    decoder: a Decoder. records: question lines from data.load_records. scoring: "letter" or "choice", as above.
    place: where a streamed model's activations wait between two layers.
    progress: label of a progress bar, None for no bar.
    The model is in eval mode meanwhile; no gradients are recorded.

    Raises ValueError for an empty set, a record that is not a question, a tokenizer without letter tokens, or a prompt
    that is longer than the model's positions or has tokens beyond its vocabulary; FloatingPointError if the model's
    answers are not finite.
    """
    questions = prepare_questions(tokenizer, records, scoring=scoring, decoder=decoder)
    return measure(decoder, questions, place=place, progress=progress)


def prepare_questions(
    tokenizer, records: Sequence[dict], *, scoring: str = "letter", decoder=None, candidates: bool = True
) -> Questions:
    """Tokenise question records once for any number of `measure` calls. Errors as in choice_accuracy.

    decoder: whose limits (positions, vocabulary) the questions are checked against; None checks neither. candidates:
    whether choices are ranked among others too, for the smooth accuracy.
    """
    if scoring not in SCORINGS:
        raise ValueError(f'scoring={scoring!r}: expected "letter" or "choice"')
    if not records:
        raise ValueError("no questions to measure: the record list is empty")
    check_repeatable(tokenizer)
    for i, record in enumerate(records):
        _check_question(record, i)
        if is_blank(record["question"][0]) and getattr(tokenizer, "is_fast", False):
            tokens(data.question_prompt(record), tokenizer, _where(record, i))  # what is behind white space is told
    texts = (_prepare_letter if scoring == "letter" else _prepare_choice)(tokenizer, records)
    answers, counts = [record["answer"] for record in records], [len(record["choices"]) for record in records]
    limit = None if decoder is None else decoder.max_positions
    questions = Questions(*texts, answers, counts)
    if scoring == "choice" and candidates:
        questions = replace(questions, candidates=_find_candidates(tokenizer, records, questions, limit))
    if decoder is not None:
        for i, sequences in enumerate(questions.sequences):
            longest = max(map(len, sequences))
            if limit is not None and longest > limit:
                raise ValueError(
                    f"{_where(records[i], i)}: the question takes {longest} tokens, the model has "
                    f"{limit} positions; shorten the question or leave it out (it is not cut, that "
                    "would change what is asked)"
                )
        names = [_where(record, i) for i, record in enumerate(records)]
        check_vocabulary(decoder.model, _tokens(questions), names)
    return questions


def _tokens(questions: Questions) -> Iterator[torch.Tensor]:
    """All tokens of each question."""
    for i, (sequences, targets) in enumerate(zip(questions.sequences, questions.targets)):
        asked = [token for ids in sequences for token in ids] + [token for pairs in targets for _, token in pairs]
        if questions.candidates is not None:
            found = questions.candidates[i]
            asked += [token for ids in found.sequences for token in ids] + [token for *_, token in found.reads]
        yield torch.tensor(asked + (questions.letters or []))


def measure(decoder, questions: Questions, *, place: Place | None = None, progress: str | None = None) -> Accuracy:
    """`choice_accuracy` of prepared questions."""
    return measure_all(decoder, {"": questions}, place=place, progress=progress)[""]


def measure_all(
    decoder,
    asked: Mapping[str, Questions],
    *,
    place: Place | None = None,
    progress: str | None = None,
) -> dict[str, Accuracy]:
    """`measure` of several sets by name, with the same bits. A streamed model reads each layer once for all of them."""
    readings = [Reading(decoder) for _ in asked]
    sets = {name: Asked(reading, questions, name) for reading, (name, questions) in zip(readings, asked.items())}
    found = read_all(decoder, readings, place, progress)
    return {name: asked.accuracy(read) for (name, asked), read in zip(sets.items(), found)}


def _accuracy(questions: Questions, scores: torch.Tensor, smooth: torch.Tensor) -> Accuracy:
    answers = torch.tensor(questions.answers)
    predictions = scores.argmax(dim=1)
    calibrated = None
    if questions.letters is not None:
        present = scores.isfinite()  # a question with fewer choices than another has -inf for those it lacks
        centred = scores - scores.where(present, 0.0).sum(dim=0) / present.sum(dim=0)
        calibrated = (centred.argmax(dim=1) == answers).double().mean().item()
    found = Accuracy(
        plain=(predictions == answers).double().mean().item(),
        calibrated=calibrated,
        predictions=predictions.tolist(),
        num_questions=len(answers),
        values=(predictions == answers).int().tolist(),
    )
    if questions.candidates is None:
        return found
    return replace(
        found,
        smooth=smooth.mean().item(),
        smooth_error=standard_error(smooth.tolist()),
        leak=leak(scores.gather(1, answers[:, None])[:, 0]),
        pool=len(answers) / sum(1 / of.pool for of in questions.candidates),
    )


def letter_tokens(tokenizer, number: int = 4) -> list[int]:
    """Token ids of the first `number` of " A" " B" " C" " D" ... behind a text that ends in "Answer:".

    Found by tokenising both texts, because tokenizers write a leading space in different ways. ValueError if a letter
    is not one token of its own.
    """
    tail = "Answer:"
    stem = _encode(tokenizer, [tail])[0]
    found = []
    letters = data.LETTERS[:number]
    for letter, full in zip(letters, _encode(tokenizer, [f"{tail} {c}" for c in letters]), strict=True):
        if full[: len(stem)] != stem or len(full) != len(stem) + 1:
            raise ValueError(_no_letters(tokenizer, f'"{tail} {letter}" is {full} after "{tail}" {stem}'))
        found.append(full[-1])
    if len(set(found)) != len(found) or getattr(tokenizer, "unk_token_id", None) in found:
        raise ValueError(_no_letters(tokenizer, f"the letters {', '.join(letters)} became the tokens {found}"))
    return found


def has_letters(tokenizer: Any, records: Sequence[Mapping]) -> bool:
    """Whether questions can be asked by letter."""
    try:
        letter_tokens(tokenizer, max(len(record["choices"]) for record in records))
    except ValueError:
        return False
    return True


def _no_letters(tokenizer, got: str) -> str:
    name = plain(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
    return (
        f"tokenizer {name}: {got}; letter scoring needs one token for each of "
        '" A" " B" " C" " D", all different, after "Answer:". Use scoring="choice", '
        "which compares the texts of the choices"
    )


def _where(record: dict, index: int) -> str:
    return record.get("_where", f"question {index}")


def _check_question(record: dict, index: int) -> None:
    missing = [key for key in ("question", "choices", "answer") if key not in record]
    if missing:
        raise ValueError(
            f"{_where(record, index)}: not a question line, it lacks {', '.join(missing)}; accuracy needs "
            "lines with question, choices and answer"
        )
    data.check_record(record, _where(record, index))


def _encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids with the tokenizer's opening special tokens (BOS), once, without closing ones (EOS)."""
    with_special = tokenizer("Answer", add_special_tokens=True)["input_ids"]
    without = tokenizer("Answer", add_special_tokens=False)["input_ids"]
    spare, length = len(with_special) - len(without), len(without)
    closing = next((spare - i for i in range(spare + 1) if with_special[i : i + length] == without), 0)
    opening = with_special[: spare - closing]
    encoded = tokenizer(list(texts), add_special_tokens=True)["input_ids"]
    own = [list(ids[len(opening) : len(ids) - closing]) for ids in encoded]
    return [[*opening[: len(opening) - twice(opening, ids)], *ids] for ids in own]


def _prepare_letter(tokenizer, records: Sequence[dict]) -> tuple[list, list, list[int] | None]:
    """`sequences`, `targets` and `letters` of `Questions`."""
    letters = letter_tokens(tokenizer, max(len(record["choices"]) for record in records))
    prompts = [data.question_prompt(record) for record in records]
    sequences = _encode(tokenizer, prompts)
    # A token may depend on all text before it (unigram models): each prompt is checked with a letter behind.
    answered = _encode(tokenizer, [f"{prompt} {data.LETTERS[0]}" for prompt in prompts])
    for i, (sequence, full) in enumerate(zip(sequences, answered, strict=True)):
        if full != [*sequence, letters[0]]:
            got = f"{_where(records[i], i)}: the prompt and {data.LETTERS[0]!r} end in {full[-3:]}"
            raise ValueError(_no_letters(tokenizer, got))
    return [[sequence] for sequence in sequences], [[[]] for _ in sequences], letters


def _prepare_choice(tokenizer, records: Sequence[dict]) -> tuple[list, list, list[int] | None]:
    stems = _encode(tokenizer, [record["question"] for record in records])
    sequences, targets = [], []
    for i, (record, stem) in enumerate(zip(records, stems, strict=True)):
        fulls = _encode(tokenizer, [f"{record['question']} {choice}" for choice in record["choices"]])
        # One start for all choices: if one's first characters join the question's last token, the sum of each
        # covers that token too. Otherwise the sums would be of different texts.
        start = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, zip(stem, *fulls)))
        if start == 0:
            raise ValueError(
                f"{_where(record, i)}: no token of the question is left in front of the choices, so nothing "
                "predicts their first token; ask a longer question"
            )
        for choice, full in zip(record["choices"], fulls, strict=True):
            if len(full) <= start:
                raise ValueError(f"{_where(record, i)}: the choice {shown(choice)} has no tokens, expected some text")
        sequences.append([full[:-1] for full in fulls])
        targets.append([[(t - 1, full[t]) for t in range(start, len(full))] for full in fulls])
    return sequences, targets, None


def _find_candidates(tokenizer, records: Sequence[dict], questions: Questions, limit: int | None) -> list[Candidates]:
    fulls = [
        [[*ids, pairs[-1][1]] for ids, pairs in zip(sequences, targets)]
        for sequences, targets in zip(questions.sequences, questions.targets)
    ]
    starts = [targets[0][0][0] + 1 for targets in questions.targets]
    return find_candidates(records, fulls, starts, functools.partial(_encode, tokenizer), limit)


class Asked:
    """A set of questions as a `Reading` has them, and its accuracy by what was read.

    family: of the set's name, to tell its questions from those of others in the same reading.
    """

    def __init__(self, reading: Reading, questions: Questions, name: str = ""):
        self.questions, self._name = questions, name
        self._plain = [self._of_question(reading, i) for i in range(len(questions.answers))]
        self._smooth = [self._of_candidates(reading, i) for i in range(len(questions.candidates or ()))]

    def _of_question(self, reading: Reading, i: int) -> tuple[np.ndarray, slice, list[int]]:
        """Rows, where their tokens' logits are, and the number of each of these's choice."""
        asked, family = self.questions, (self._name, i)
        texts = [reading.add(ids, family) for ids in asked.sequences[i]]
        if asked.letters is not None:
            letters = asked.letters[: asked.num_choices[i]]
            rows = reading.rows(texts[0][-1:]).repeat(len(letters))
            return rows, reading.tokens(rows, letters), list(range(len(letters)))
        reads = [
            (nodes[position], token, choice)
            for choice, (nodes, pairs) in enumerate(zip(texts, asked.targets[i], strict=True))
            for position, token in pairs
        ]
        nodes, tokens, choices = (list(column) for column in zip(*reads))
        rows = reading.rows(nodes)
        return rows, reading.tokens(rows, tokens), choices

    def _of_candidates(self, reading: Reading, i: int) -> tuple[np.ndarray, slice]:
        found = self.questions.candidates[i]
        texts = [reading.add(ids, (self._name, i)) for ids in found.sequences]
        rows = reading.rows([texts[sequence][position] for sequence, position, _ in found.reads])
        return rows, reading.tokens(rows, [token for *_, token in found.reads])

    def accuracy(self, read: Rows) -> Accuracy:
        """FloatingPointError for an answer that is not finite."""
        asked = self.questions
        plain = torch.full((len(asked.answers), max(asked.num_choices)), float("-inf"), dtype=torch.float64)
        for i, (rows, at, choices) in enumerate(self._plain):
            scores = read.logits[at] if asked.letters is not None else read.logits[at] - read.log_sums[rows]
            sums = torch.zeros(asked.num_choices[i], dtype=torch.float64)
            sums.index_add_(0, torch.tensor(choices), torch.from_numpy(scores))  # in the order of the tokens
            self._check_finite(i, sums)
            plain[i, : len(sums)] = sums
        smooth = torch.zeros(len(self._smooth), dtype=torch.float64)
        for i, (rows, at) in enumerate(self._smooth):
            log_probs = torch.from_numpy(read.logits[at] - read.log_sums[rows])
            self._check_finite(i, log_probs)
            smooth[i] = asked.candidates[i].smooth(log_probs)
        return _accuracy(asked, plain, smooth)

    def _check_finite(self, question: int, scores: torch.Tensor) -> None:
        if not torch.isfinite(scores).all():
            which = f"question {question}" + f" of {plain(self._name)}" * bool(self._name)
            raise FloatingPointError(
                f"the model's answer to {which} is not a finite number ({scores.tolist()}): its weights have diverged; "
                "use a lower learning rate or an earlier checkpoint"
            )
