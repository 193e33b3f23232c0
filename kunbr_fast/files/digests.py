"""Digests of values that JSON can hold, and of tokenizers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import xxhash


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A digest of how a tokenizer makes ids of a text or a chat; "" of None. What its last call has set (truncation,
    padding) does not count."""
    if tokenizer is None:
        return ""
    digest, backend = xxhash.xxh3_128(), getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "to_str"):
        add_json(digest, without(json.loads(backend.to_str()), ("truncation", "padding")))
    elif hasattr(tokenizer, "get_vocab"):  # one in Python: its merges are in no common place
        add_json(digest, [type(tokenizer).__name__, tokenizer.get_vocab(), getattr(tokenizer, "bpe_ranks", None)])
    add_json(digest, [getattr(tokenizer, name, None) for name in ("chat_template", "special_tokens_map")])
    return digest.hexdigest()


def without(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """values without what does not count, also in the objects inside."""
    kept = {str(name): value for name, value in values.items() if name not in names}
    return {name: without(value, names) if isinstance(value, Mapping) else value for name, value in kept.items()}


def add_json(digest: Any, value: Any) -> None:
    digest.update(json.dumps(value, sort_keys=True, default=str).encode())
