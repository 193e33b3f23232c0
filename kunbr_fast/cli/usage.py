"""A wrong command line is one line: which word, what was expected, and the nearest right one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NoReturn

from kunbr_fast.files.shown import plain, shown


class Parser(argparse.ArgumentParser):
    """commands: of the top one alone, all their names; chosen: the parser of the command that is given."""

    def __init__(self, *args: Any, commands: Collection[str] = (), **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.commands, self.chosen = commands, self

    def error(self, message: str) -> NoReturn:
        if message.endswith(("expected one argument", "expected at least one argument")):
            message += " (one that begins with a dash: --option=-VALUE)"
        text = plain(" ".join(message.split()), 2000)
        self.exit(2, f"{self.prog}: error: {text}; {self.prog} --help shows all\n")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        self._check(words)
        found, rest = self.parse_known_args(words, namespace)
        if rest:
            self.chosen.error(f"unexpected {shown(rest[0])}")
        return found

    def _check(self, words: list[str]) -> None:
        """Unknown words first: argparse would name the options that are missing for want of them."""
        at = next((i for i, word in enumerate(words) if not word.startswith("-")), len(words))
        self._check_options(words[:at])
        if not words:
            self.error("no command: kunbr-fast demo shows what it does, kunbr-fast doctor what can run here")
        if at < len(words):
            if words[at] not in self.commands:
                self.error(f"unknown command {shown(words[at])}{nearest(words[at], self.commands)}")
            self.chosen._check_options(words[at + 1 :])

    def _check_options(self, words: Iterable[str]) -> None:
        known = [option for action in self._actions for option in action.option_strings]
        for word in words:
            name = word.partition("=")[0]
            if word == "--":
                return
            if name.startswith("--") and " " not in word and not any(option.startswith(name) for option in known):
                self.error(f"unknown option {plain(name)}{nearest(name, known)}")

    def _print_message(self, message: str, file: Any = None) -> None:
        """argparse takes no notice where a help could not be printed."""
        if file is None or file is sys.stderr:
            super()._print_message(message, file)
        elif message:
            file.write(message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = list(map(str, action.choices))
            text = f"unknown {shown(value)}{nearest(str(value), choices)}: expected one of {', '.join(choices)}"
            raise argparse.ArgumentError(action, text)


def nearest(name: str, known: Iterable[str]) -> str:
    import difflib

    found = difflib.get_close_matches(name[:100], list(known), n=2)
    return f" (did you mean {' or '.join(found)}?)" if found else ""
