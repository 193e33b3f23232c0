"""What a model is asked about a set of records, as tokens, and what it says, from what was read."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from kunbr_fast.data import IGNORE, TextSettings
from kunbr_fast.data.items import Item
from kunbr_fast.data.text import PLAIN
from kunbr_fast.evaluation.accuracy import Asked as AskedQuestions
from kunbr_fast.evaluation.accuracy import has_letters, prepare_questions
from kunbr_fast.evaluation.probability import prepare_answers
from kunbr_fast.evaluation.reading import Reading, Rows
from kunbr_fast.measures.answers import Answer, Readout
from kunbr_fast.measures.registry import READ
from kunbr_fast.model.decoder import Decoder

BEGINNING = 0.5  # of a text line: the share of its tokens that it is to be continued from

Piece = tuple[Sequence[int], np.ndarray, slice, np.ndarray]  # tokens, rows, where their logits are, which tokens count


@dataclasses.dataclass(frozen=True)
class Asking:
    """text, max_length: how records become tokens. most_new: tokens of a text line's reference. read: what of `READ` is
    to be read; the others are empty in the readout."""

    text: TextSettings = PLAIN
    max_length: int | None = None
    most_new: int = 128
    read: Collection[str] = READ


class AskedSet:
    """A set's texts in a `Reading`: of each item its answer, the answer in other words and wrong ones, and of questions
    what both scorings ask. What items have in common (the question) goes through the model once.

    prompts: of each item the tokens that its answer (of a chat the last one) follows, for generation; of a text line
    its first half.
    references: what should follow, as text.
    """

    def __init__(
        self,
        reading: Reading,
        name: str,
        items: Sequence[Item],
        tokenizer: Any,
        decoder: Decoder,
        asking: Asking,
    ):
        self.name, self.items, self._tokenizer, self.reading = name, items, tokenizer, reading
        records = [{"_where": f"{name} record {i}", **item.record} for i, item in enumerate(items)]
        self.questions = [i for i, record in enumerate(records) if "question" in record]
        asked, read = [records[i] for i in self.questions], asking.read
        scorings = [scoring for scoring in ("letter", "choice") if scoring in read]
        self._asked = _asked_questions(reading, name, asked, tokenizer, decoder, scorings)
        owners: list[tuple[int, str]] = []  # of each text: its item, and what it is of it
        texts: list[dict[str, Any]] = []
        for i, (item, record) in enumerate(zip(items, records)):
            texts_of = _texts(item, record)
            for kind, one in texts_of if "alternatives" in read else [pair for pair in texts_of if pair[0] == "own"]:
                owners.append((i, kind))
                texts.append(one)
        self._pieces: dict[str, list[list[list[Piece]]]] = {
            kind: [[] for _ in items] for kind in ("own", "paraphrase", "wrong")
        }
        self.prompts: list[list[int]] = [[] for _ in items]
        self.references = [""] * len(items)
        for (i, kind), pieces in zip(owners, _encoded(texts, tokenizer, decoder, asking, owners, self.questions)):
            if kind != "own" or "answers" in read:
                self._pieces[kind][i].append([self._piece(i, ids, counts) for ids, counts in pieces])
            if kind == "own":
                self._continued(i, *pieces[0], "text" in records[i], asking.most_new)

    def _piece(self, item: int, ids: list[int], counts: np.ndarray) -> Piece:
        nodes = self.reading.add(ids, (self.name, item))
        rows = self.reading.rows([nodes[at - 1] for at in counts])
        return ids, rows, self.reading.tokens(rows, [ids[at] for at in counts]), counts

    def _continued(self, item: int, ids: list[int], counts: np.ndarray, is_text: bool, most_new: int) -> None:
        gaps = np.flatnonzero(np.diff(counts) > 1)  # between an assistant's turns: the last one is to follow
        own = counts[gaps[-1] + 1 :] if len(gaps) else counts
        first = max(1, int(len(ids) * BEGINNING)) if is_text else int(own[0])
        self.prompts[item] = ids[:first]
        wanted = ids[first : first + most_new] if is_text else [ids[at] for at in own]
        self.references[item] = self.decoded(wanted)

    def check_prompts(self, limit: int | None, new: int) -> None:
        """ValueError for a prompt that leaves no room for `new` tokens in the model's positions."""
        for i, ids in enumerate(self.prompts):
            if limit is not None and len(ids) + new > limit:
                raise ValueError(
                    f"{self._where(i)}: its prompt has {len(ids)} tokens and {new} are to be generated "
                    f"(max_new_tokens), but the model has {limit} positions: generate fewer, or leave it out"
                )

    def _where(self, item: int) -> str:
        return self.items[item].record.get("_where", f"{self.name} record {item}")

    def decoded(self, ids: Sequence[int]) -> str:
        """As text, without special tokens and white space around it."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

    def readout(self, read: Rows, generated: Sequence[str] | None = None, states: Any = None) -> Readout:
        """What the model says. generated: of each item; states: a `LayerReadout`. FloatingPointError for what is not
        finite."""
        own = [self._answer(read, i, of[0]) for i, of in enumerate(self._pieces["own"]) if of]
        paraphrases = [self._answer(read, i, of[0]) if of else None for i, of in enumerate(self._pieces["paraphrase"])]
        wrong = [[self._answer(read, i, one) for one in of] for i, of in enumerate(self._pieces["wrong"])]
        found = {scoring: asked.accuracy(read) for scoring, asked in self._asked.items()}
        return Readout(
            self.items, own, paraphrases, wrong, self.questions, found.get("letter"), found.get("choice"),
            generated, self.references, states,
        )  # fmt: skip

    def _answer(self, read: Rows, item: int, pieces: Sequence[Piece]) -> Answer:
        """The pieces of a line that was cut are one answer."""
        parts, tokens = [], []
        for ids, rows, at, counts in pieces:
            asked = np.array([ids[i] for i in counts], dtype=np.int64)
            parts.append((read.logits[at] - read.log_sums[rows], read.best[rows] == asked, read.means[rows]))
            parts[-1] += (read.deviations[rows], asked)
            tokens += asked.tolist()
        log_probs, greedy, means, deviations, asked = (np.concatenate(column) for column in zip(*parts))
        if not np.isfinite(log_probs).all():
            raise FloatingPointError(
                f"the model's answer to {self._where(item)} is not a finite number: its weights have diverged; use a "
                "lower learning rate or an earlier checkpoint"
            )
        return Answer(asked, log_probs, greedy, means, deviations, self.decoded(tokens))


def _asked_questions(
    reading: Reading,
    name: str,
    records: Sequence[Mapping],
    tokenizer: Any,
    decoder: Decoder,
    scorings: Sequence[str],
) -> dict[str, AskedQuestions]:
    """By scoring; without "letter" where the tokenizer has no letters of its own."""
    found = {}
    for scoring in scorings if records else ():
        if scoring == "letter" and not has_letters(tokenizer, records):
            continue
        questions = prepare_questions(tokenizer, records, scoring=scoring, decoder=decoder)
        found[scoring] = AskedQuestions(reading, questions, name)
    return found


def _texts(item: Item, record: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What is read of an item: its own text, and the same with another answer. A question is asked without its choices,
    which follow it one by one."""
    if "question" in record:
        pairs = [(f" {choice}", number == record["answer"]) for number, choice in enumerate(record["choices"])]
        asked = {"prompt": record["question"], "_where": record["_where"]}
        return [("own" if right else "wrong", {**asked, "completion": text}) for text, right in pairs]
    others = [("paraphrase", item.paraphrase)] * (item.paraphrase is not None)
    others += [("wrong", text) for text in item.perturbed]
    return [("own", dict(record)), *((kind, _with_answer(record, text)) for kind, text in others)]


def _with_answer(record: Mapping[str, Any], answer: str) -> dict[str, Any]:
    if "messages" in record:
        messages = list(record["messages"])
        last = max((i for i, one in enumerate(messages) if one["role"] == "assistant"), default=len(messages) - 1)
        return {**record, "messages": [*messages[:last], {**messages[last], "content": answer}]}
    if "completion" not in record:
        raise ValueError(f"{record['_where']}: a text line has no answer that another one could stand in place of")
    return {**record, "completion": answer}


def _encoded(
    texts: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    decoder: Decoder,
    asking: Asking,
    owners: Sequence[tuple[int, str]],
    questions: Collection[int],
) -> list[list[tuple[list[int], np.ndarray]]]:
    """Of each text its pieces: token ids, and the places of those that count."""
    found: list[list[tuple[list[int], np.ndarray]]] = [[] for _ in texts]
    for of_questions in (True, False):  # a question's choice has its own space, whatever the separator
        mine = [n for n, (item, _) in enumerate(owners) if (item in questions) is of_questions]
        if not mine:
            continue
        how = dict(decoder=decoder, text=PLAIN if of_questions else asking.text, max_length=asking.max_length)
        answers = prepare_answers(tokenizer, [texts[n] for n in mine], **how)
        for owner, sample in zip(answers.owners, answers.samples):
            counts = np.flatnonzero(sample["labels"].numpy() != IGNORE)
            found[mine[owner]].append((sample["input_ids"].tolist(), counts[counts > 0]))
    return found
