"""Records -> samples -> packed batches, and the order of steps.

A record is a line of JSONL, or a row of a table (`load_records`), a sample its tokens and labels (`encode`), a
`PackedBatch` several samples side by side (`pack`).
"""

from kunbr_fast.data.batch import PackedBatch, grid, join, pack, send
from kunbr_fast.data.content import LETTERS
from kunbr_fast.data.encode import ALTERNATES, REFUSALS, encode, encode_named
from kunbr_fast.data.reading import load_records
from kunbr_fast.data.records import check_record, is_question, is_record, question_prompt
from kunbr_fast.data.samples import IGNORE, Sample, as_samples, check_labels, check_lengths, with_alternates
from kunbr_fast.data.schedule import Schedule, token_batches
from kunbr_fast.data.text import TARGETS, TextSettings

__all__ = [
    "ALTERNATES",
    "IGNORE",
    "LETTERS",
    "REFUSALS",
    "TARGETS",
    "PackedBatch",
    "Sample",
    "Schedule",
    "TextSettings",
    "as_samples",
    "check_labels",
    "check_record",
    "check_lengths",
    "encode",
    "encode_named",
    "grid",
    "is_question",
    "is_record",
    "join",
    "load_records",
    "pack",
    "question_prompt",
    "send",
    "token_batches",
    "with_alternates",
]
