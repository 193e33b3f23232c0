"""YAML, as far as it means the same to everybody: the values of JSON.

PyYAML's scanner, parser and resolver make nodes, one at a time; what the nodes stand for is decided here. It reads YAML
1.1, in which `on` is true, 010 is 8, 1:30 is 90 and 1e-5 is text. The first is kept, the next two are refused, the last
is a number here, as in YAML 1.2.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from kunbr_fast.files.scalars import Refused, integer, no_number, real
from kunbr_fast.files.shown import plain, shown

TAG = "tag:yaml.org,2002:"
QUOTES = "put it in quotes if it is text"
TRUE = ("yes", "true", "on")


class _Nodes(yaml.SafeLoader):
    """Aliases and tags are refused where they stand, before anything is built, and so is what is nested too deep."""

    def __init__(self, text: str, depth: int):
        super().__init__(text)
        self.left = depth

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise Refused(f"the alias *{plain(event.anchor, 40)} is not taken: write its value out", _line(event))
        if getattr(event, "tag", None) not in (None, "!"):
            raise Refused(f"the tag {plain(event.tag.replace(TAG, '!!'), 60)} is not taken: leave it out", _line(event))
        if not self.left:
            raise Refused("nested too deep: expected settings, one or two levels of them", _line(event))
        self.left -= 1
        node = super().compose_node(parent, index)
        self.left += 1
        return node


_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$")
_Nodes.add_implicit_resolver(f"{TAG}float", _FLOAT, list("-+.0123456789"))


def value_of(text: str, depth: int) -> Any:
    """The value of a text's only document, None if it is empty. Refused, with the line; yaml.YAMLError."""
    loader = _Nodes(text, depth)
    try:
        node = loader.get_single_node()
    finally:
        loader.dispose()
    return None if node is None else _value(node)


def _line(marked: Any) -> int:
    return marked.start_mark.line + 1


def _value(node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for key, value in node.value:
            name = _key(key)
            if name in found:
                raise Refused(f"the key {shown(name)} occurs twice: keep one", _line(key))
            try:
                found[name] = _value(value)
            except Refused as error:
                named = f"{plain(name, 40)}: {error}" if isinstance(value, yaml.ScalarNode) else str(error)
                raise Refused(named, error.line) from error
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    try:
        return _scalar(node.tag.removeprefix(TAG), node.value)
    except Refused as error:
        raise Refused(str(error), _line(node)) from error


def _key(node: yaml.Node) -> str:
    if node.tag == f"{TAG}merge":
        raise Refused("the merge key << is not taken: write its settings out", _line(node))
    if not isinstance(node, yaml.ScalarNode):
        raise Refused("got a list or mapping as a key, expected a name", _line(node))
    if node.tag != f"{TAG}str":
        made = node.tag.removeprefix(TAG)
        raise Refused(f"the key {shown(node.value)} is read as {plain(made, 40)}: {QUOTES}", _line(node))
    return _checked(node.value, _line(node))


def _checked(text: str, line: int | None = None) -> str:
    """A text, unless it holds half of a surrogate pair, which an escape can spell and no tokenizer takes."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise Refused(f"not valid Unicode: {shown(text)}", line) from error
    return text


def _scalar(kind: str, text: str) -> Any:
    if kind == "str":
        return _checked(text)
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() in TRUE
    if kind in ("int", "float"):
        return _number(kind, text)
    if kind == "timestamp":
        raise Refused(f"{shown(text)} is read as a date: {QUOTES}")
    raise Refused(f"{shown(text)} is read as {plain(kind, 40)}, which is not taken: {QUOTES}")


def _number(kind: str, text: str) -> int | float:
    digits = text.replace("_", "")
    if ":" in digits:
        raise Refused(f"{shown(text)} is read as a number in base 60: write it in decimal, or {QUOTES}")
    if re.fullmatch(r"[-+]?0[0-9]+", digits):
        raise Refused(f"{shown(text)} is read as a number in base 8: write it without the 0, or {QUOTES}")
    if re.fullmatch(r"[-+]?0[xb][0-9a-fA-F]{1,64}", digits):
        return integer(str(int(digits, 0)))
    if digits.lower().lstrip("+-") in (".inf", ".nan"):
        return no_number(text)
    return integer(digits) if kind == "int" else real(digits)
