"""PTX text -> a Kernel: parameters, shared memory, registers, and instructions with their jumps resolved."""

import dataclasses
import re

from .values import REGISTER, Fault, num_bytes

# a label, the begin or end of a scope, or a statement (whose operand lists have braces too)
_PART = re.compile(r"\s*(?:(?P<label>[\w$]+)\s*:(?!:)|(?P<scope>[{}])|(?P<statement>[^\s;{}](?:[^;{}]|\{[^{}]*\})*);)")
_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]")
_STATEMENT = re.compile(
    r"(?:@(?P<not>!?)(?P<guard>%?[\w$]+)\s+)?(?P<op>[a-z]\w*)(?P<mods>(?:\.[\w:]+)*)\s*(?P<args>.*)", re.S
)


@dataclasses.dataclass
class Instruction:
    """`@guard op.mods args`. Of a jump the argument is an index into the code."""

    text: str
    op: str
    mods: list[str]
    args: list
    guard: str | None
    negated: bool


@dataclasses.dataclass(frozen=True)
class Parameter:
    offset: int
    size: int
    type: str


def split_arguments(text):
    """At commas outside of brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "[{(") - (c in "]})")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts if part.strip()]


def vector(text):
    """The names in {a, b}, or the one name."""
    return [name.strip() for name in text.strip("{} ").split(",")]


def _align(offset, alignment):
    return -(-offset // alignment) * alignment


class Kernel:
    """The entry of a PTX module."""

    def __init__(self, text):
        text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.S)
        text = re.sub(r"^\s*\.(loc|file|section)\b[^\n]*$", "", text, flags=re.M)
        entry = re.search(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)", text)
        self.name = entry[1]
        self.shared, self.dynamic, self.shared_end = {}, None, 0
        for found in _SHARED.finditer(text, 0, entry.start()):
            self._declare_shared(found)
        self.params = self._parameters(entry[2])
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", entry[3])
        self.threads = int(threads[1]) if threads else None
        self.registers, self.code = {}, []
        self._body(text, entry.end())

    def _declare_shared(self, found):
        alignment, name, size = int(found[1]), found[2], found[3]
        if size:
            self.shared[name] = _align(self.shared_end, alignment)
            self.shared_end = self.shared[name] + int(size)
        else:
            self.dynamic = name

    def _parameters(self, text):
        params, self.param_bytes = {}, 0
        for declared in split_arguments(text):
            type_ = re.search(r"\.([busf]\d+)\b", declared)[1]
            size = num_bytes(type_)
            offset = _align(self.param_bytes, size)
            params[declared.split()[-1]] = Parameter(offset, size, type_)
            self.param_bytes = offset + size
        return params

    def _body(self, text, at):
        """Scopes have registers and labels of their own (inline assembly uses them): (number, registers, labels)."""
        scopes, every, jumps = [], 0, []
        while True:
            part = _PART.match(text, at)
            if part is None:
                raise Fault(f"{self.name}: what is {text[at : at + 80]!r}?")
            at = part.end()
            if part["scope"] == "{":
                scopes.append((every, {}, {}))
                every += 1
            elif part["scope"] == "}":
                scopes.pop()
                if not scopes:
                    break
            elif part["label"]:
                scopes[-1][2][part["label"]] = len(self.code)
            else:
                self._statement(part["statement"], scopes, jumps)
        for instruction, visible in jumps:
            label = instruction.args[0]
            instruction.args = [next(labels[label] for _, _, labels in reversed(visible) if label in labels)]

    def _statement(self, text, scopes, jumps):
        if text.startswith(".reg"):
            _, type_, names = text.split(None, 2)
            return self._declare_registers(type_[1:], names, scopes[-1])
        if text.startswith("."):
            shared = _SHARED.match(text)
            return self._declare_shared(shared) if shared else None
        found = _STATEMENT.fullmatch(text)
        renamed = {name: new for _, registers, _ in scopes[1:] for name, new in registers.items()}

        def rename(operand):
            return re.sub(r"%?[A-Za-z_$][\w$]*", lambda name: renamed.get(name[0], name[0]), operand)

        jump = found["op"] == "bra"
        arguments = [a if jump else rename(a) for a in split_arguments(found["args"])]
        guard = rename(found["guard"]) if found["guard"] else None
        mods = [mod for mod in found["mods"].split(".") if mod]
        line = re.sub(r"\s+", " ", text)
        self.code.append(Instruction(line, found["op"], mods, arguments, guard, bool(found["not"])))
        if jump:
            jumps.append((self.code[-1], list(scopes)))

    def _declare_registers(self, type_, names, scope):
        number, local, _ = scope
        for name in split_arguments(names):
            many = re.fullmatch(r"(.+)<(\d+)>", name)
            for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                local[one] = f"{one}@{number}" if number else one
                self.registers[local[one]] = REGISTER[type_]
