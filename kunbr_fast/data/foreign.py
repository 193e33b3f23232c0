"""Records as other tools write them: recognised by their keys, and shown as the record of ours that says the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kunbr_fast.data.content import LETTERS
from kunbr_fast.files.shown import plain, shown

Record = Mapping[Any, Any]
Ours = dict[str, Any] | None  # None: not this form after all

PROMPTS = ("prompt", "question", "query", "instruction", "inputs", "input", "text", "context", "user", "problem")
ANSWERS = (
    *("completion", "answer", "answers", "response", "output", "outputs", "target", "targets", "gt", "labels"),
    *("reply", "solution", "ground_truth", "assistant", "chosen"),
)
TEXTS = ("content", "contents", "sentence", "document", "passage", "article", "body", "raw_text", "story", "fact")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def recognised(record: Record) -> str | None:
    """What form of another tool this is, and the record as one of ours; None for one that is not known. Keys may be
    written in capitals."""
    names = {key.strip().lower(): key for key in record if isinstance(key, str)}
    found = _recognised(record, {key: key for key in record})
    return found or _recognised({key: record[name] for key, name in names.items()}, names)


def _recognised(record: Record, names: Mapping[Any, Any]) -> str | None:
    """names: the record's keys as they are written."""
    for name, keys, rewritten in TOOLS:
        if all(record.get(key) is not None for key in keys) and (ours := rewritten(record)) is not None:
            return f"{_listed([names[key] for key in keys])}: this is {name} form. Write {_line(ours)}"
    prompt, answer = (next((k for k in words if _is_text(record.get(k))), None) for words in (PROMPTS, ANSWERS))
    if prompt and answer and (prompt, answer) != ("prompt", "completion"):
        ours = {"prompt": record[prompt], "completion": record[answer]}
        return f"{_listed([names[prompt], names[answer]])} are no form of ours. Write {_line(ours)}"
    if not any(key in record for key in ("question", "text", "prompt", "completion", "messages")):
        for key in TEXTS:
            if _is_text(record.get(key)):
                return f"{names[key]!r} is no form of ours. Write {_line({'text': record[key]})}"
    return None


def index_of(answer: Any, choices: Any) -> int | None:
    """The index that an answer stands for: a letter, the text of one choice, or digits; None where it is not clear."""
    if not isinstance(answer, str) or not isinstance(choices, (list, tuple)):
        return answer if isinstance(answer, int) and not isinstance(answer, bool) else None
    texts, wanted = [str(choice).strip() for choice in choices], answer.strip()
    if texts.count(wanted) == 1:
        return texts.index(wanted)
    letter = wanted.strip("().: ").upper()
    if len(letter) == 1 and letter in LETTERS[: len(texts)]:
        return LETTERS.index(letter)
    return int(wanted) if wanted.isdecimal() and len(wanted) < 3 and int(wanted) < len(texts) else None


# ---------------------------------------------------------------- forms of other tools


def _pair(prompt: str, *answers: str) -> Callable[[Record], Ours]:
    """prompt + completion; the first of `answers` that is there."""

    def rewritten(record: Record) -> Ours:
        answer = next((record[key] for key in answers if record.get(key) is not None), None)
        answer = answer[0] if isinstance(answer, list) and answer else answer
        texts = _is_text(record[prompt]) and _is_text(answer)
        return {"prompt": record[prompt], "completion": answer} if texts else None

    return rewritten


def _instruction(record: Record) -> Ours:
    prompt = [record[key] for key in ("instruction", "input", "context") if _is_text(record.get(key))]
    answer = record.get("output", record.get("response"))
    return {"prompt": "\n".join(prompt), "completion": answer} if prompt and _is_text(answer) else None


def _preference(record: Record) -> Ours:
    """What is to be forgotten is the answer that is not preferred."""
    if not all(map(_is_text, (record["chosen"], record["rejected"]))):
        return {"prompt": "...", "completion": "the rejected answer", "alternate": "the chosen one"}
    prompt = record.get("prompt") if _is_text(record.get("prompt")) else "..."
    return {"prompt": prompt, "completion": record["rejected"], "alternate": record["chosen"]}


def _lettered(key: str, answer: str) -> Callable[[Record], Ours]:
    def rewritten(record: Record) -> Ours:
        choices = [record[letter] for letter in LETTERS if record.get(letter) is not None]
        return _question(record[key], choices, record[answer])

    return rewritten


def _options(record: Record) -> Ours:
    options = record["options"]
    if isinstance(options, Mapping):  # {"A": ..., "B": ...}
        options = [options[key] for key in sorted(options, key=str)]
    answers = [record[key] for key in ("answer_index", "answer_idx", "answer") if record.get(key) is not None]
    found = [ours for answer in answers if (ours := _question(record["question"], options, answer)) is not None]
    return found[0] if found else None


def _arc(record: Record) -> Ours:
    choices = record["choices"]
    if not isinstance(choices, Mapping) or not isinstance(choices.get("text"), list):
        return _question(record["question"], choices, record["answerKey"])
    labels = choices.get("label")
    known = isinstance(labels, list) and record["answerKey"] in labels
    answer = labels.index(record["answerKey"]) if known else record["answerKey"]
    return _question(record["question"], choices["text"], answer)


def _question(question: Any, choices: Any, answer: Any) -> Ours:
    index = index_of(answer, choices)
    return None if index is None else {"question": question, "choices": choices, "answer": index}


def _squad(record: Record) -> Ours:
    answers = record["answers"].get("text") if isinstance(record["answers"], Mapping) else record["answers"]
    context = [record["context"]] if _is_text(record.get("context")) else []
    if not (isinstance(answers, list) and answers and _is_text(answers[0]) and _is_text(record["question"])):
        return None
    return {"prompt": "\n".join([*context, record["question"]]), "completion": answers[0]}


def _conversation(key: str) -> Callable[[Record], Ours]:
    def rewritten(record: Record) -> Ours:
        turns = record[key]
        if not (isinstance(turns, list) and turns and all(isinstance(turn, Mapping) for turn in turns)):
            return None
        messages = []
        for turn in turns[:2]:
            role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
            messages.append({"role": ROLES.get(role, "user") if isinstance(role, str) else "user", "content": content})
        return {"messages": messages}

    return rewritten


# name, the keys by which it is known, how it is written here; the first that fits is told
TOOLS: tuple[tuple[str, tuple[str, ...], Callable[[Record], Ours]], ...] = (
    ("TRL's preference", ("chosen", "rejected"), _preference),
    ("ShareGPT's", ("conversations",), _conversation("conversations")),
    ("ShareGPT's", ("conversation",), _conversation("conversation")),
    ("a lettered question's", ("question", "A", "B", "answer"), _lettered("question", "answer")),
    ("a lettered question's", ("input", "A", "B", "target"), _lettered("input", "target")),
    ("MedQA's or MMLU-Pro's", ("question", "options"), _options),
    ("ARC's", ("question", "choices", "answerKey"), _arc),
    ("Alpaca's", ("instruction", "output"), _instruction),
    ("Dolly's", ("instruction", "response"), _instruction),
    ("SQuAD's", ("question", "answers"), _squad),
    ("RWKU's", ("query", "answer"), _pair("query", "answer")),
    ("MUSE's", ("prompt", "gt"), _pair("prompt", "gt")),
    ("KnowUnDo's", ("text", "labels"), _pair("text", "labels")),
    ("TOFU's", ("question", "answer", "paraphrased_answer"), _pair("question", "answer")),
    ("TOFU's", ("question", "answer", "perturbed_answer"), _pair("question", "answer")),
    ("TOFU's or MUSE's", ("question", "answer"), lambda r: None if "choices" in r else _pair("question", "answer")(r)),
)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _listed(keys: Sequence[str]) -> str:
    keys = [shown(key, 30) for key in keys]
    return " and ".join([", ".join(keys[:-1]), keys[-1]] if len(keys) > 1 else keys)


def _line(record: Mapping[str, Any]) -> str:
    """The line of JSON, its values cut."""
    return plain(json.dumps(_cut(record, 5), ensure_ascii=False, default=lambda value: "..."), 260)


def _cut(value: Any, levels: int) -> Any:
    if isinstance(value, str):
        return value if len(value) <= 40 else f"{value[:37]}..."
    if isinstance(value, int) and not isinstance(value, bool):
        return value if value.bit_length() < 64 else "..."
    if isinstance(value, (list, tuple)):
        return [_cut(item, levels - 1) for item in value[: len(LETTERS)]] if levels else "..."
    if isinstance(value, Mapping):
        return {str(key)[:20]: _cut(item, levels - 1) for key, item in list(value.items())[:4]} if levels else "..."
    return value
