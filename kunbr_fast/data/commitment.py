"""A commitment to a set of records: who has the records can check that they were the set, and nobody reads them there.

    leaf_i = SHA-256(canonical record i)                                    (`canonical`)
    whole  = SHA-256("kunbr-fast set 1" 0x00 || leaves in ascending order)
    commitment = scrypt(whole, salt, n=2^15, r=8, p=1)                       (RFC 7914), 32 bytes

One value stands for the whole set, in any order: a record that somebody guesses cannot be tested by itself, all others
must be known. The salt is public, and random for each set, so that no table made beforehand is of use. scrypt makes a
guess of the whole set take 32 MiB and about 0.1 s. What is not hidden: the number of records; and a set so small that
all of it can be guessed.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec

from kunbr_fast.data.canonical import canonical

Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]  # 32 bytes
DERIVATION = "scrypt(n=32768, r=8, p=1)"
_TAG = b"kunbr-fast set 1\0"


class Commitment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """records: how many there are. salt: public. commitment: one value for the whole set, see docs/certificate.md."""

    records: Annotated[int, msgspec.Meta(ge=1)]
    derivation: Literal["scrypt(n=32768, r=8, p=1)"]
    salt: Digest
    commitment: Digest


def commit(records: Sequence[Mapping[str, Any]], salt: str | None = None) -> Commitment:
    """salt: 32 bytes in hexadecimal, of an earlier commitment to compare with; None: random. ValueError for no records,
    and where Python lacks scrypt."""
    if not records:
        raise ValueError("no records to commit to: expected at least one")
    if not hasattr(hashlib, "scrypt"):
        raise ValueError("this Python has no hashlib.scrypt: install one that was built with OpenSSL 1.1 or later")
    salt = secrets.token_hex(32) if salt is None else salt
    leaves = sorted(hashlib.sha256(canonical(record).encode()).digest() for record in records)
    whole = hashlib.sha256(_TAG + b"".join(leaves)).digest()
    # scrypt takes 128 * n * r bytes, which is just above what OpenSSL allows unasked
    found = hashlib.scrypt(whole, salt=bytes.fromhex(salt), n=2**15, r=8, p=1, maxmem=2**26, dklen=32)
    return Commitment(len(records), DERIVATION, salt, found.hex())
