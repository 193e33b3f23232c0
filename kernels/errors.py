"""Errors that callers tell apart."""


class Unavailable(RuntimeError):
    """A named implementation cannot run here; the message says what is missing."""
