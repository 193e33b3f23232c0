"""Records with what published sets have beside them: the same answer in other words, and wrong ones."""

from __future__ import annotations

import dataclasses
from typing import Any

OWN = "own"  # the form of a record of ours


@dataclasses.dataclass(frozen=True)
class Item:
    """A record that is measured.

    record: as `load_records` has it (question + choices + answer, text, prompt + completion, or messages).
    paraphrase: the right answer in other words. perturbed: wrong answers. Both stand in place of the completion, so
    they begin as it does (with its space). A four-choice question needs neither: its wrong choices are wrong answers.
    form: of the line that it was made of, a name such as "tofu"; "own" for a record of ours.
    """

    record: dict[str, Any]
    paraphrase: str | None = None
    perturbed: tuple[str, ...] = ()
    form: str = OWN
