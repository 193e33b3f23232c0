"""Records as other tools write them: recognised by their keys, and shown as the record of ours that says the same."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kunbr_fast.data.annotations import is_annotation
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
ROLES = {"human": "user"} | dict.fromkeys(("gpt", "chatgpt", "bot", "model", "bard", "bing"), "assistant")
SYSTEMS, HISTORIES = ("system", "system_prompt", "system_message"), ("history", "chat_history")  # beside a prompt
OTHER = "alternate"
COLUMNS = "--forget-columns or its like,"
WIDTH = 230  # of a line that is shown


def recognised(record: Record) -> str | None:
    """What form of another tool this is, and the record as one of ours; None for one that is not known. Keys may be
    written in capitals."""
    names = {key.strip().lower(): key for key in record if isinstance(key, str)}
    found = _recognised(record, {key: key for key in record})
    return found or _recognised({key: record[name] for key, name in names.items()}, names)


def _recognised(record: Record, names: Mapping[Any, Any]) -> str | None:
    """names: the record's keys as they are written."""

    def written(keys: Sequence[str], what: str, ours: dict[str, Any], also: Sequence[str] = (), cure: str = "") -> str:
        if _is_text(record.get(OTHER)):
            ours = {**ours, OTHER: record[OTHER]}
        ours, kept = _with_context(record, ours)
        left = [key for key in record if key not in (*keys, *also, *kept, OTHER) and _is_left_out(key, record[key])]
        more = f" (and {len(left) - 3} more)" * (len(left) > 3)
        has = "have" if len(left) > 1 else "has"
        without = f", and {_listed([names[key] for key in left[:3]])}{more} {has} no place in ours" if left else ""
        read = f" (read by {cure})" if cure else ""
        return f"{_listed([names[key] for key in keys])}{what}{read}{without}. Write {_line(ours)}"

    for name, keys, rewritten, also, cure in TOOLS:
        if all(record.get(key) is not None for key in keys) and (ours := rewritten(record)) is not None:
            reads = not cure.startswith("preset=") or all(_is_of_preset(record[key]) for key in keys)
            return written(keys, f": this is {name} form", ours, also, cure if reads else "")
    prompt, answer = (next((k for k in words if _is_text(record.get(k))), None) for words in (PROMPTS, ANSWERS))
    if prompt and answer:
        ours = {"prompt": record[prompt], "completion": behind(record[prompt], record[answer])}
        if (prompt, answer) != ("prompt", "completion"):
            renamed = [(prompt, "prompt"), (answer, "completion")]
            columns = " ".join(f"{plain(names[key], 30)}={mine}" for key, mine in renamed if key != mine)
            return written((prompt, answer), " are no form of ours", ours, cure=f"{COLUMNS} {columns}")
        if kept := _with_context(record, ours)[1]:
            return written((prompt, answer, *kept), " are a chat", ours)
    if not any(key in record for key in ("question", "text", "prompt", "completion", "messages")):
        for key in TEXTS:
            if _is_text(record.get(key)):
                return written(
                    (key,), " is no form of ours", {"text": record[key]}, cure=f"{COLUMNS} {plain(names[key], 30)}=text"
                )
    return None


def _is_of_preset(value: Any) -> bool:
    """Whether a preset reads it: a text, or a list of lines."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(line, Mapping) for line in value))


def _is_left_out(key: Any, value: Any) -> bool:
    empty = value is None or (isinstance(value, (str, list, tuple, Mapping)) and not value)
    return not (empty or is_annotation(key))


def behind(prompt: str, answer: str) -> str:
    """The answer as it stands behind the prompt: with a space of its own where there is none, and words have one."""
    wide = unicodedata.east_asian_width(prompt[-1]) in "WF" or unicodedata.east_asian_width(answer[0]) in "WF"
    return answer if wide or prompt[-1].isspace() or answer[0].isspace() else f" {answer}"


def _with_context(record: Record, ours: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The record of ours with what stands before its prompt: a system message, earlier turns. And their keys."""
    system = next((key for key in SYSTEMS if _is_text(record.get(key))), None)
    history = next((key for key in HISTORIES if _turns(record.get(key))), None)
    if "messages" not in ours and not ("completion" in ours and (system or history)):
        return ours, []
    messages = ours.get("messages") or [
        {"role": "user", "content": ours["prompt"].strip()},
        {"role": "assistant", "content": ours["completion"].strip()},
    ]
    kept = [key for key in (system, history if "messages" not in ours else None) if key]
    earlier = _turns(record[history]) if history in kept else []
    first = [{"role": "system", "content": record[system]}] if system else []
    if len(messages) + len(earlier) > 4:  # enough to see where each belongs
        earlier, messages = (
            [*earlier[:2], *(["..."] * bool(earlier))],
            [*messages[:2], *(["..."] * (len(messages) > 2))],
        )
    other = {OTHER: ours[OTHER].strip()} if OTHER in ours else {}
    return {"messages": [*first, *earlier, *messages], **other}, kept


def _turns(value: Any) -> list[dict[str, Any]]:
    """A list of turns, in any of the usual forms, as messages of ours; empty for what is none."""
    messages = []
    for turn in value if isinstance(value, (list, tuple)) else ():
        if isinstance(turn, Mapping):
            role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
            known = ROLES.get(role.strip().lower(), role) if isinstance(role, str) else "user"
            messages.append({"role": known, "content": content})
        elif isinstance(turn, (list, tuple)) and len(turn) == 2:  # a question and its answer
            messages += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turn)]
        else:
            return []
    return messages


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
        return {"prompt": record[prompt], "completion": behind(record[prompt], answer)} if texts else None

    return rewritten


def _instruction(record: Record) -> Ours:
    prompt = "\n".join(record[key] for key in ("instruction", "input", "context") if _is_text(record.get(key)))
    answer = record.get("output", record.get("response"))
    return {"prompt": prompt, "completion": behind(prompt, answer)} if prompt and _is_text(answer) else None


def _preference(record: Record) -> Ours:
    """What is to be forgotten is the answer that is not preferred."""
    prompt, chosen, rejected = (record.get(key) for key in ("prompt", "chosen", "rejected"))
    if not all(map(_is_text, (chosen, rejected))):
        prompt, chosen, rejected = None, "the chosen one", "the rejected answer"
    prompt = prompt if _is_text(prompt) else "..."
    return {"prompt": prompt, "completion": behind(prompt, rejected), OTHER: behind(prompt, chosen)}


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


def _nested(record: Record) -> Ours:
    """KnowUnDo's whole file, one line: its first record."""
    first = record["train"][0] if isinstance(record["train"], list) and record["train"] else {}
    texts = isinstance(first, Mapping) and _is_text(first.get("text")) and _is_text(first.get("labels"))
    return _pair("text", "labels")(first) if texts else None


def _squad(record: Record) -> Ours:
    answers = record["answers"].get("text") if isinstance(record["answers"], Mapping) else record["answers"]
    context = [record["context"]] if _is_text(record.get("context")) else []
    if not (isinstance(answers, list) and answers and _is_text(answers[0]) and _is_text(record["question"])):
        return None
    prompt = "\n".join([*context, record["question"]])
    return {"prompt": prompt, "completion": behind(prompt, answers[0])}


def _conversation(key: str) -> Callable[[Record], Ours]:
    def rewritten(record: Record) -> Ours:
        turns = _turns(record[key])
        return {"messages": turns} if turns else None

    return rewritten


_LETTERED = "A=choices B=choices ..."
# name, the keys by which it is known, how it is written here, what else of it is kept, and what would read it as it is
# (of a preset or columns, see `reading`); the first that fits is told
TOOLS: tuple[tuple[str, tuple[str, ...], Callable[[Record], Ours], tuple[str, ...], str], ...] = (
    ("TRL's preference", ("chosen", "rejected"), _preference, ("prompt",), ""),
    ("ShareGPT's", ("conversations",), _conversation("conversations"), (), ""),
    ("ShareGPT's", ("conversation",), _conversation("conversation"), (), ""),
    (
        "a lettered question's",
        ("question", "A", "B", "answer"),
        _lettered("question", "answer"),
        (*LETTERS,),
        f"{COLUMNS} {_LETTERED}",
    ),
    (
        "a lettered question's",
        ("input", "A", "B", "target"),
        _lettered("input", "target"),
        (*LETTERS,),
        f"{COLUMNS} input=question target=answer {_LETTERED}",
    ),
    ("MedQA's or MMLU-Pro's", ("question", "options"), _options, ("answer", "answer_idx", "answer_index"), ""),
    ("ARC's", ("question", "choices", "answerKey"), _arc, (), ""),
    ("Alpaca's", ("instruction", "output"), _instruction, ("input", "context"), ""),
    ("Dolly's", ("instruction", "response"), _instruction, ("input", "context"), ""),
    ("SQuAD's", ("question", "answers"), _squad, ("context",), ""),
    ("RWKU's", ("query", "answer"), _pair("query", "answer"), (), f"{COLUMNS} query=prompt answer=completion"),
    ("MUSE's", ("prompt", "gt"), _pair("prompt", "gt"), (), "preset=muse"),
    ("KnowUnDo's", ("train",), _nested, ("val",), "preset=knowundo"),
    ("KnowUnDo's", ("text", "labels"), _pair("text", "labels"), (), "preset=knowundo"),
    (
        "TOFU's or MUSE's",
        ("question", "answer"),
        lambda r: None if "choices" in r else _pair("question", "answer")(r),
        (),
        "preset=tofu or muse",
    ),
)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _listed(keys: Sequence[str]) -> str:
    keys = [shown(key, 30) for key in keys]
    return " and ".join([", ".join(keys[:-1]), keys[-1]] if len(keys) > 1 else keys)


def _line(record: Mapping[str, Any]) -> str:
    """The line of JSON, its values cut."""
    lines = [json.dumps(_cut(record, 5, n), ensure_ascii=False, default=lambda value: "...") for n in (40, 20, 10)]
    return plain(next((line for line in lines if len(line) <= WIDTH), lines[-1]), WIDTH)


def _cut(value: Any, levels: int, length: int) -> Any:
    if isinstance(value, str):
        return value if len(value) <= length else f"{value[: length - 3]}..."
    if isinstance(value, int) and not isinstance(value, bool):
        return value if value.bit_length() < 64 else "..."
    if isinstance(value, (list, tuple)):
        return [_cut(item, levels - 1, length) for item in value[: len(LETTERS)]] if levels else "..."
    if isinstance(value, Mapping):
        return (
            {str(key)[:20]: _cut(item, levels - 1, length) for key, item in list(value.items())[:4]}
            if levels
            else "..."
        )
    return value
