"""Which keys a record may have: those of its form, and annotations that nobody reads. Any other one is refused: what
it holds would not be used, and nobody would notice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from kunbr_fast.data.annotations import is_annotation
from kunbr_fast.data.foreign import recognised
from kunbr_fast.files.shown import shown

Form = tuple[str, ...]
FORMS: tuple[Form, ...] = (("question", "choices", "answer"), ("text",), ("prompt", "completion"), ("messages",))
OTHER_ANSWER = "alternate"  # of any form, for the objectives that take it
FACT = "fact"  # of any form: which fact the record is about, where several records say the same
HINTS = {
    "tools": "a chat's template is not given tools: write them into a system message",
    "system": 'write it as the first of the messages, {"role": "system", "content": ...}',
    **dict.fromkeys(
        ("weight", "weights"),
        "all records count alike: repeat one that is to count more, leave out one that is not to count",
    ),
    "loss_mask": "--target says which tokens have a loss",
    "label": "a record is to be forgotten or kept by its file, not by a key",
    "abstract": "preset=wmdp leaves it out, as --ignore-keys would",
    **dict.fromkeys(("paraphrased_answer", "perturbed_answer"), "preset=tofu leaves it out, as --ignore-keys would"),
    "input_ids": "it is tokens or text: give samples of input_ids and labels, or records",
}


def told(form: Form) -> str:
    return " + ".join(form)


def form_of(record: Mapping[Any, Any], where: str) -> Form:
    """The keys of the record's form. ValueError, beginning with `where`, for none or two of them, and for a key that
    would not be used. A form of which something is missing is its form too: what the missing key should hold says more.
    """
    given = {key for key, value in record.items() if value is not None}
    whole = [form for form in FORMS if given.issuperset(form)]
    if len(whole) > 1:
        raise ValueError(f"{where}: it has two forms, {told(whole[0])} and {told(whole[1])}: keep the keys of one")
    begun = whole or [form for form in FORMS if given.intersection(form)] or [f for f in FORMS if record.keys() & {*f}]
    unused = _unused(record, begun[0] if begun else ())
    if whole:  # else an empty list may be what is wrong with it
        unused = [key for key in unused if not _is_nothing(key, record[key])]
    if (unused or not whole) and (other := recognised(record)):
        raise ValueError(f"{where}: {other}")
    if not begun:
        near = _nearest(unused, [key for form in FORMS for key in form])
        raise ValueError(
            f"{where}: unknown form with keys {shown(list(record), 120)}{near}: expected question + choices + answer, "
            "text, prompt + completion, or messages"
        )
    if unused:
        raise ValueError(f"{where}: {_would_not_be_used(unused, begun[0], record)}")
    if whole and (null := _read_first(record, whole[0])):
        raise ValueError(f"{where}: {null!r} is null, beside {told(whole[0])}: leave it out")
    return begun[0]


def keys_of(record: Mapping[Any, Any]) -> Form:
    """The keys of the form of a record that was checked (`form_of`)."""
    return next(form for form in FORMS if all(record.get(key) is not None for key in form))


def is_record_of_ours(record: Mapping[Any, Any]) -> bool:
    """Whether it has all keys of one form, and none that would not be used. What they hold is not looked at."""
    whole = [form for form in FORMS if all(record.get(key) is not None for key in form)]
    return len(whole) == 1 and all(_is_nothing(key, record[key]) for key in _unused(record, whole[0]))


def _unused(record: Mapping[Any, Any], form: Form) -> list[Any]:
    """The keys that hold something, and that no record of this form has. form: () for none at all."""
    used = {*form, OTHER_ANSWER, FACT} if form else set()
    return [key for key in record if record[key] is not None and key not in used and not is_annotation(key)]


def _is_nothing(key: Any, value: Any) -> bool:
    """A list of nothing ("tools": []) under no key of ours."""
    return isinstance(value, (list, dict)) and not value and not any(key in form for form in FORMS)


def _read_first(record: Mapping[Any, Any], form: Form) -> str | None:
    """A key that makes the record one of another form to those who look for keys alone."""
    before = [other for other in FORMS[: FORMS.index(form)] if other[0] in record]
    return before[0][0] if before else None


def _would_not_be_used(unused: list[Any], form: Form, record: Mapping[Any, Any]) -> str:
    keys, more = ", ".join(shown(key, 30) for key in unused[:4]), f" and {len(unused) - 4} more" * (len(unused) > 4)
    text = f"{keys}{more} beside {told(form)} would not be used: "
    near = _nearest(unused, [key for key in (*form, OTHER_ANSWER, FACT) if key not in record])
    if near or unused[0] in HINTS:
        return text + (near.removeprefix(", ") or HINTS[unused[0]])
    return f"{text}delete it, begin its name with '_', or name it to --ignore-keys (load_records: ignore_keys=)"


def _nearest(found: Iterable[Any], wanted: list[str]) -> str:
    """A wanted key that one of the found ones differs from by a letter or its case."""
    for key in list(found)[:20]:
        if isinstance(key, str) and len(key) < 40:
            near = difflib.get_close_matches(key.strip().lower(), wanted, 1, 0.8)
            if near:
                return f", did you mean {near[0]!r} by {shown(key)}?"
    return ""
