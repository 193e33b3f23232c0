"""Files of published sets as their authors have them: each line's form is known by its keys and their types.

| set | its files | keys |
| --- | --- | --- |
| RTT | splits, corpora | records of ours: question, choices, answer; text |
| TOFU | full, forgetN, retainN | question, answer |
| | ..._perturbed | + paraphrased_question, paraphrased_answer, perturbed_answer (a list) |
| | real_authors, world_facts | + option1 to option4 |
| MUSE | knowmem | question, answer |
| | verbmem | prompt, gt |
| | raw, train, scal, sust, privleak | text; in the repository some are arrays of texts |
| WMDP | questions | a record of ours: question, choices, answer |
| | corpora | text; bio-forget: title, abstract, doi too |
| RWKU | forget_level1 to 3, neighbor_level1 and 2 | query, answer, level, type, subject |
| | passage, positive, negative; forget_mia, retain_mia | text, subject, intro |
| | intro (the targets) | target, intro |
| | retain_mmlu | question, choices, answer, examples, task, subject |
| KnowUnDo | unlearn, retention | one object: train and val, lists of text and labels |

Sources, of github and huggingface: aghyad-deeb/unlearning_evaluation; locuslab/TOFU (card, and data/ of locuslab/tofu),
arXiv 2401.06121; muse-bench/MUSE-News and MUSE-Books (dataset_info), swj0419/muse_bench (eval.py), arXiv 2407.06460;
cais/wmdp and cais/wmdp-corpora (dataset_info), arXiv 2403.03218; jinzhuoran/RWKU (eval_forget.py, eval_neighbor.py,
eval_mia.py, eval_mmlu.py, generation/pair_generation.py, process/data_process.py), arXiv 2406.10890; zjunlp/KnowUnDo
(save_tokenized_dataset.py: `train[0]`, with --val `val[0]`), arXiv 2407.01920.

OpenUnlearning reads the first three under the same keys (its configs/data/datasets), a question's paraphrases beside
the question as it is. MUSE's knowmem and TOFU's lines have the same keys and give the same record; it is called "tofu".
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kunbr_fast.data.forms import FORMS, is_record_of_ours
from kunbr_fast.data.items import OWN, Item
from kunbr_fast.data.presets import PRESETS, Form, Lines, Preset, Reader
from kunbr_fast.data.reading import File, files

logger = logging.getLogger(__name__)


def load_items(
    paths: str | Path | Sequence[str | Path],
    ignore_keys: Iterable[str] = (),
    equal_choices: str = "error",
    columns: Mapping[str, str] | None = None,
    preset: str | None = None,
    chat: bool = False,
    say: Callable[[str], None] = logger.info,
) -> list[Item]:
    """Reads files of our own forms and of published sets (above): records, their paraphrases and wrong answers.

    The first four arguments are `load_records`'; beside what that reads, a file may be one JSON object over several
    lines. A line that is a record of ours stays as it is; else the first set whose keys it has, and no others, makes
    the record that the preset of its name makes. preset: that set's forms and ours alone. chat: questions and their
    answers are messages (TOFU's as OpenUnlearning trains instruct models). say: gets one line a file, which counts the
    forms, and the keys and blank texts that were left out.

    Errors: those of `load_records`; also ValueError "file:line: ..." for a line of no known set, and for other answers
    that are no text.
    """
    return [item for file in item_files(paths, ignore_keys, equal_choices, columns, preset, chat, say) for item in file]


def item_files(
    paths: str | Path | Sequence[str | Path],
    ignore_keys: Iterable[str] = (),
    equal_choices: str = "error",
    columns: Mapping[str, str] | None = None,
    preset: str | None = None,
    chat: bool = False,
    say: Callable[[str], None] = logger.info,
) -> list[File]:
    """`load_items`, file by file: iterating one reads it; then its `reader` has the counts (`forms`, `left_out`)."""
    return files(
        paths, ignore_keys, equal_choices, columns, preset,
        lambda: Recogniser(chat) if preset is None else Reader(preset, kept=True, chat=chat), say,
    )  # fmt: skip


class Recogniser(Lines):
    """By the keys that they have; lines are counted by form."""

    used = True

    def __init__(self, chat: bool = False):
        super().__init__([preset for name, preset in PRESETS.items() if name != "tofu_chat"], kept=True, chat=chat)

    def item(self, line: Mapping[str, Any], where: str) -> Item:
        found = self._recognised(line)
        item = Item(dict(line)) if found is None else self.made(*found, line, where)
        self.forms[item.form] += 1
        return item

    def _recognised(self, line: Mapping[str, Any]) -> tuple[Preset, Form] | None:
        """The set and its form; None for a line that is ours, or that none has. One with keys too many is the first
        set's whose form it has: the error names these keys."""
        if is_record_of_ours(line):
            return None
        candidates = list(self._candidates(line))
        whole = [found for found in candidates if is_record_of_ours(self.record(*found, line) or {})]
        begun = any(all(line.get(key) is not None for key in form) for form in FORMS)
        return next(iter(whole or ([] if begun else candidates)), None)

    def _candidates(self, line: Mapping[str, Any]) -> Iterator[tuple[Preset, Form]]:
        for preset in self.presets:
            for form in preset.forms:
                if form.is_of(line):
                    yield preset, form

    def told(self, lines: int) -> str:
        if set(self.forms) == {OWN} and not self.left_out:
            return ""
        return ", ".join(f"{count} {form}" for form, count in self.forms.items()) + self.without()
