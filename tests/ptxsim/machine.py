"""One program (CUDA's thread block) at a time: registers of all its threads, operands, and who runs next."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .flow import meeting_points
from .order import Order
from .shared import Shared
from .values import REGISTER, U8, U32, U64, Fault

PARAM = 0x6000_0000_0000  # where addresses of parameters begin
BUILD = {}  # opcode -> build(machine, instruction) -> run(mask) -> None, or the waits that it begins


def instruction(*opcodes):
    """Registers a builder."""

    def register(build):
        BUILD.update(dict.fromkeys(opcodes, build))
        return build

    return register


@dataclass
class Wait:
    """Threads that stand still until ready() says so (and then takes over what they have waited for)."""

    mask: np.ndarray
    ready: Callable[[], bool]


class Join:
    """Where the threads of a branch meet again; `outer`: the branch around it."""

    def __init__(self, at, need, outer):
        self.at, self.need, self.outer, self.arrived = at, need, outer, np.zeros_like(need)


@dataclass
class Group:
    """Threads that run together: the next instruction, who they are, and where they are to meet others."""

    at: int
    mask: np.ndarray
    join: Join | None
    ready: Callable[[], bool] | None = None


class Machine:
    """A kernel made ready to run. `launch` runs every program of a grid on `Global` memory.

    seed: of the choice of who runs next and of when copies come; equal seeds, equal runs.
    """

    def __init__(self, kernel, dynamic_shared=0, threads=None, seed=0):
        self.kernel = kernel
        self.num_threads = kernel.threads or threads
        self.warps = -(-self.num_threads // 32)
        self.all = np.ones(self.num_threads, bool)
        self.thread = np.arange(self.num_threads, dtype=U32)
        self.warp_of = np.arange(self.num_threads) // 32
        self.random = np.random.default_rng(seed)
        self.executed, self.dynamic_shared = 0, dynamic_shared
        self.index = {name: i for i, name in enumerate(kernel.registers)}
        self.dtypes = list(kernel.registers.values())
        dynamic_at = -(-kernel.shared_end // 1024) * 1024
        self.symbols = dict(kernel.shared)
        if kernel.dynamic:
            self.symbols[kernel.dynamic] = dynamic_at
        self.shared_bytes = dynamic_at + dynamic_shared if kernel.dynamic else kernel.shared_end
        self.meeting = meeting_points(kernel.code)
        self.runs = [None] * len(kernel.code)  # built when they are first run

    def _build(self, ins):
        if ins.op not in BUILD:
            raise Fault("not an instruction that is known here (tests/ptxsim)")
        return BUILD[ins.op](self, ins)

    # ------------------------------------------------------------ operands

    def operand(self, text, type_):
        """A function that gives the operand's bits for all threads, as a register of that type holds them."""
        if text in self.index:
            i = self.index[text]
            return lambda: self.registers[i]
        if text.startswith("!"):
            i = self.index[text[1:]]
            return lambda: ~self.registers[i]
        if text.startswith("%"):
            return self._special(text)
        value = np.full(self.num_threads, self._constant(text, REGISTER[type_]))
        return lambda: value

    def _special(self, text):
        once = {"%tid.x": self.thread, "%laneid": self.thread % U32(32), "%warpid": self.thread // U32(32)}
        once |= {"%ntid.x": self.all * U32(self.num_threads)}
        once |= {name: self.all * U32(0) for name in ("%ctaid.y", "%ctaid.z")}
        once |= {name: self.all * U32(1) for name in ("%nctaid.y", "%nctaid.z")}
        every = {"%ctaid.x": lambda: self.program, "%nctaid.x": lambda: self.grid}
        if text in every:
            return lambda: np.full(self.num_threads, every[text](), U32)
        if text not in once:
            raise Fault(f"what is {text}?")
        return lambda: once[text]

    def _constant(self, text, dtype):
        if text in self.symbols:
            return dtype.type(self.symbols[text])
        if text in self.kernel.params:
            return U64(PARAM + self.kernel.params[text].offset)
        bits = re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text)
        if bits:
            return dtype.type(int(bits[1] or bits[2], 16))
        number = re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|\d+)U?", text)
        if not number:
            raise Fault(f"what is the operand {text!r}?")
        value = int(number[2], 0) * (-1 if number[1] else 1)
        return dtype.type(value if dtype.kind == "b" else value & ((1 << 8 * dtype.itemsize) - 1))

    def address(self, text):
        """[register + n] or [symbol + n]: a function that gives int64 addresses."""
        found = re.fullmatch(r"\[\s*([%\w$@.]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        base, offset = self.operand(found[1], "b64"), int(found[2] or 0)
        return lambda: base().astype(np.int64) + offset

    def write(self, name, bits, mask):
        """Into a register of the active threads; "_" takes nothing."""
        if name != "_":
            i = self.index[name]
            bits = bits.astype(self.dtypes[i], copy=False)
            self.registers[i] = bits if mask is self.all else np.where(mask, bits, self.registers[i])

    def warps_in(self, mask):
        return np.unique(self.warp_of[mask])

    def whole_warps(self, mask):
        """For instructions of all threads of a warp."""
        if mask is not self.all:
            warps = mask.reshape(-1, 32)
            if (warps.any(1) != warps.all(1)).any():
                raise Fault("a part of a warp runs what the whole warp must run")

    # ------------------------------------------------------------ programs

    def launch(self, grid, params, memory):
        self.memory, self.grid, self.params = memory, grid, np.frombuffer(params, U8)
        memory.begin()
        for self.program in range(grid):
            self._run_program()
        memory.end()

    def _run_program(self):
        """Registers begin as NaN: all bits set."""
        self.registers = [np.full(self.num_threads, 0 if d.kind == "b" else np.iinfo(d).max, d) for d in self.dtypes]
        self.order = Order(self.warps)
        self.shared = Shared(self.shared_bytes, self.order)
        self.copies = [([], []) for _ in range(self.warps)]  # of each warp: not committed, committed groups
        self.products, self.moved = {}, {}  # of each warpgroup, of its sums: see products.py
        self.under_way = []  # tensor copies: what is left to do
        self.barriers, self.mbarriers, self.maps = {}, {}, {}
        self.runnable, self.waiting = [Group(0, self.all, None)], []
        while self.runnable or self.waiting:
            self._wake()
            if self.under_way and (not self.runnable or self.random.random() < 0.3):
                self.under_way.pop(int(self.random.integers(len(self.under_way))))()
            elif self.runnable:
                self._run_group(self._next())
            else:
                stuck = {self.kernel.code[group.at - 1].text: int(group.mask.sum()) for group in self.waiting}
                raise Fault("deadlock: " + "; ".join(f"{n} threads wait at `{text}`" for text, n in stuck.items()))
        if self.under_way:
            raise Fault("the program ends with a tensor copy under way")
        if any(state.arrived for state in self.barriers.values()):
            raise Fault("the program ends with a barrier that some threads wait for no more")

    def _wake(self):
        for group in [group for group in self.waiting if group.ready()]:
            self.waiting.remove(group)
            self.runnable.append(Group(group.at, group.mask, group.join))

    def _next(self):
        """Most often who is behind, so that threads meet; now and then anyone. Who stands there too comes along."""
        behind = min(self.runnable, key=lambda group: group.at)
        if len(self.runnable) > 1 and self.random.random() < 0.3:
            behind = self.runnable[int(self.random.integers(len(self.runnable)))]
        together = [group for group in self.runnable if group.at == behind.at and group.join is behind.join]
        self.runnable = [group for group in self.runnable if not any(group is other for other in together)]
        mask = np.logical_or.reduce([group.mask for group in together])
        return Group(behind.at, self._tidy(mask), behind.join)

    def _tidy(self, mask):
        return self.all if mask.all() else mask

    def _run_group(self, group):
        """Until its threads part, wait or end."""
        while self._meet(group):
            ins = self.kernel.code[group.at]
            self.executed += 1
            mask = group.mask
            if ins.guard is not None:
                guard = self.registers[self.index[ins.guard]]
                mask = self._tidy(mask & (~guard if ins.negated else guard))
                if not mask.any():
                    group.at += 1
                    continue
            if ins.op == "bra":
                if not self._branch(group, mask, ins.args[0]):
                    return
            elif ins.op in ("ret", "exit"):
                self._leave(mask, group.join)
                group.mask = group.mask & ~mask
                group.at += 1
                if not group.mask.any():
                    return
            elif not self._step(group, mask, ins):
                return

    def _meet(self, group):
        """Whether the group goes on; at its meeting point the last one takes the others along."""
        while group.join is not None and group.at == group.join.at:
            join = group.join
            join.arrived = join.arrived | group.mask
            if (join.arrived != join.need).any():
                return False
            group.mask, group.join = self._tidy(join.need), join.outer
        return True

    def _branch(self, group, taken, target):
        if (taken == group.mask).all():
            group.at = target
            return True
        join = group.join
        if self.meeting[group.at] is not None:
            join = Join(self.meeting[group.at], group.mask, join)
        self.runnable += [Group(target, taken, join), Group(group.at + 1, group.mask & ~taken, join)]
        return False

    def _leave(self, mask, join):
        """Threads that end are waited for no more."""
        while join is not None:
            join.need = join.need & ~mask
            if join.need.any() and (join.arrived == join.need).all():
                self.runnable.append(Group(join.at, self._tidy(join.need), join.outer))
                join.need = np.zeros_like(join.need)
            join = join.outer

    def _step(self, group, mask, ins):
        try:
            if self.runs[group.at] is None:
                self.runs[group.at] = self._build(ins)
            waits = self.runs[group.at](mask)
        except Fault as fault:
            raise Fault(f"{self.kernel.name}, `{ins.text[:120]}`: {fault}") from None
        group.at += 1
        if not waits or all([wait.ready() for wait in waits]):
            return True
        rest = group.mask
        for wait in waits:
            self.waiting.append(Group(group.at, self._tidy(wait.mask), group.join, wait.ready))
            rest = rest & ~wait.mask
        if rest.any():
            self.runnable.append(Group(group.at, rest, group.join))
        return False


def pack(kernel, values):
    """Parameter memory from a value for each parameter: ints, floats."""
    out = np.zeros(kernel.param_bytes, U8)
    for parameter, value in zip(kernel.params.values(), values, strict=True):
        dtype = REGISTER[parameter.type]
        kind = {"f32": np.float32, "f64": np.float64}.get(parameter.type)
        bits = kind(value).view(dtype) if kind else dtype.type(int(value) & ((1 << 8 * dtype.itemsize) - 1))
        out[parameter.offset : parameter.offset + parameter.size] = np.array([bits]).view(U8)[: parameter.size]
    return out.tobytes()
