"""Keys that a record or sample may have and that nobody reads."""

from __future__ import annotations

# What published sets say about a line, beside its contents. Any name that begins with "_" is one too.
ANNOTATIONS = frozenset(
    "id idx index uid uuid guid question_id split fold subset subject topic category subcategory domain type level "
    "difficulty task source src dataset origin url link doi title name author entity date year timestamp created "
    "added license lang language tags meta metadata note notes comment comments score token_count correct_year "
    "original_question correct_answer wrong_answers".split()
)


def is_annotation(key: object) -> bool:
    return isinstance(key, str) and (key.startswith("_") or key in ANNOTATIONS)
