"""Instructions that take each thread's registers and give it others."""

import operator

import numpy as np

from .machine import instruction
from .products import follow_move
from .values import FLOAT, HALF, REGISTER, SIGNED, U32, U64, UNSIGNED, Fault, decode, encode, fma, is_float, num_bytes

INTEGER = SIGNED | UNSIGNED


def elementwise(machine, ins, function, types, result):
    """The first operand = function(the numbers of the others, of these types)."""
    gets = [(machine.operand(arg, type_), type_) for arg, type_ in zip(ins.args[1:], types, strict=True)]

    def run(mask):
        values = [decode(get(), type_) for get, type_ in gets]
        machine.write(ins.args[0], encode(function(*values), result), mask)

    return run


def arithmetic(function):
    """A builder for operations with operands of one type, which may be two halves in a register."""

    def build(machine, ins):
        type_, count = ins.mods[-1], len(ins.args) - 1
        if not type_.endswith("x2"):
            return elementwise(machine, ins, function, [type_] * count, type_)
        half = type_[:-2]
        gets = [machine.operand(arg, "b32") for arg in ins.args[1:]]

        def run(mask):
            values = [decode(np.ascontiguousarray(get()).view(REGISTER[half]), half) for get in gets]
            machine.write(ins.args[0], encode(function(*values), half).view(U32), mask)

        return run

    return build


for _op, _function in {
    "sub": operator.sub,
    "neg": operator.neg,
    "abs": np.abs,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": operator.invert,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a.astype(np.float64)),
    "rcp": lambda a: 1 / a,
    "ex2": lambda a: np.exp2(a.astype(np.float64)),
    "lg2": lambda a: np.log2(a.astype(np.float64)),
    "fma": fma,
}.items():
    instruction(_op)(arithmetic(_function))
add = instruction("add")(arithmetic(operator.add))


@instruction("mul", "mad")
def multiply(machine, ins):
    """mul.lo, .wide, .hi of integers and mul of floats; with a third operand that is added (mad)."""
    type_ = ins.mods[-1]
    if type_ not in INTEGER or "lo" in ins.mods:
        return arithmetic(lambda a, b, c=None: a * b if c is None else a * b + c)(machine, ins)
    wide = type_[0] + str(16 * num_bytes(type_))
    if wide not in INTEGER:
        raise Fault("a product of 128 bits")
    if "hi" in ins.mods:
        bits = INTEGER[wide](8 * num_bytes(type_))
        function = lambda a, b: (a.astype(INTEGER[wide]) * b.astype(INTEGER[wide])) >> bits  # noqa: E731
        return elementwise(machine, ins, function, [type_, type_], type_)
    function = lambda a, b, c=0: a.astype(INTEGER[wide]) * b.astype(INTEGER[wide]) + INTEGER[wide](c)  # noqa: E731
    return elementwise(machine, ins, function, [type_, type_, wide][: len(ins.args) - 1], wide)


def quotient(a, b):
    """Towards zero. (What a division by zero gives is not defined: here the numerator.)"""
    b = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        return a // b
    magnitude = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -magnitude, magnitude)


@instruction("div")
def divide(machine, ins):
    return arithmetic(operator.truediv if ins.mods[-1] in FLOAT else quotient)(machine, ins)


instruction("rem")(arithmetic(lambda a, b: a - quotient(a, b) * b))


@instruction("min", "max")
def extreme(machine, ins):
    """Of floats the one that is a number, unless .NaN says that NaN wins."""
    plain, numbers = (np.minimum, np.fmin) if ins.op == "min" else (np.maximum, np.fmax)
    return arithmetic(numbers if ins.mods[-1] in FLOAT and "NaN" not in ins.mods else plain)(machine, ins)


@instruction("shl", "shr")
def shift(machine, ins):
    """By more bits than there are: nothing is left, or copies of the sign."""
    type_ = ins.mods[-1]
    bits = 8 * num_bytes(type_)

    def function(a, count):
        kept = (a << count.astype(a.dtype)) if ins.op == "shl" else (a >> np.minimum(count, bits - 1).astype(a.dtype))
        return kept if type_ in SIGNED and ins.op == "shr" else np.where(count >= bits, a.dtype.type(0), kept)

    return elementwise(machine, ins, function, [type_, "u32"], type_)


@instruction("bfe")
def extract_bits(machine, ins):
    """`count` bits from `first` on, of an int32 the last one of them copied upwards."""
    type_ = ins.mods[-1]
    if type_ not in ("u32", "s32"):
        raise Fault("bfe of 64 bits")

    def function(a, first, count):
        first, count = (x.astype(np.int64) & 255 for x in (first, count))
        up = 64 - np.minimum(count, 32)
        kept = (a.astype(np.int64) >> np.minimum(first, 63)) << np.minimum(up, 63)
        kept = kept if type_ == "s32" else kept.view(U64)
        return np.where(count == 0, 0, kept >> np.minimum(up, 63).astype(kept.dtype))

    return elementwise(machine, ins, function, [type_, "u32", "u32"], type_)


@instruction("mov", "cvta")
def move(machine, ins):
    """Also {a, b} = c and c = {a, b}: a register in parts."""
    to, source = ins.args
    type_ = ins.mods[-1]
    if "{" not in to + source:
        get = machine.operand(source, type_)

        def run(mask):
            machine.write(to, get(), mask)
            if machine.products:
                follow_move(machine, source, to)

        return run
    names = (to if "{" in to else source).strip("{} ").replace(" ", "").split(",")
    part = f"b{8 * num_bytes(type_) // len(names)}"
    if "{" in to:
        get = machine.operand(source, type_)

        def run(mask):
            parts = np.ascontiguousarray(get()).view(UNSIGNED[part]).reshape(-1, len(names))
            for name, bits in zip(names, parts.T):
                machine.write(name, bits, mask)

        return run
    gets = [machine.operand(name, part) for name in names]

    def run(mask):
        parts = np.stack([get().astype(UNSIGNED[part]) for get in gets], 1)
        machine.write(to, parts.view(UNSIGNED[type_])[:, 0], mask)

    return run


@instruction("selp")
def select(machine, ins):
    to, a, b, condition = ins.args
    first, second = (machine.operand(x, ins.mods[-1]) for x in (a, b))
    which = machine.operand(condition, "pred")
    return lambda mask: machine.write(to, np.where(which(), first(), second()), mask)


_ORDERED = {"eq": "equal", "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal"}
_ORDERED |= {"lo": "less", "ls": "less_equal", "hi": "greater", "hs": "greater_equal", "ne": "not_equal"}


def _comparison(name, floats):
    """lt: NaN gives false. ltu: NaN gives true. num, nan: whether neither, or one of them is NaN."""
    if name == "num":
        return lambda a, b: (a == a) & (b == b)
    if name == "nan":
        return lambda a, b: (a != a) | (b != b)
    if not floats:
        return getattr(np, _ORDERED[name])
    plain = getattr(np, _ORDERED[name.removesuffix("u") if name not in ("lo", "ls") else name])
    if name.endswith("u"):
        return lambda a, b: plain(a, b) | (a != a) | (b != b)
    return lambda a, b: plain(a, b) & (a == a) & (b == b)


@instruction("setp")
def compare(machine, ins):
    """p|q = a ? b, and optionally `and`, `or`, `xor` a predicate; q has the opposite."""
    type_ = ins.mods[-1]
    function = _comparison(ins.mods[0], is_float(type_))
    a, b = (machine.operand(x, type_) for x in ins.args[1:3])
    combine = next((getattr(np, f"logical_{x}") for x in ins.mods if x in ("and", "or", "xor")), None)
    third = machine.operand(ins.args[3], "pred") if combine else None
    names = ins.args[0].split("|")

    def run(mask):
        found = function(decode(a(), type_), decode(b(), type_))
        for name, bits in zip(names, (found, ~found)):
            machine.write(name, combine(bits, third()) if combine else bits, mask)

    return run


_ROUNDING = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


@instruction("cvt")
def convert(machine, ins):
    to, of = ins.mods[-2:]
    if to.endswith("x2"):
        return _convert_pair(machine, ins, to[:-2])
    rounding = next((_ROUNDING[mod] for mod in ins.mods if mod in _ROUNDING), None)
    if to in INTEGER and is_float(of):  # saturates; NaN gives 0
        limits = np.iinfo(INTEGER[to])

        def function(a):
            a = rounding(a.astype(np.float64))
            return np.where(a != a, 0, np.clip(a, limits.min, limits.max)).astype(INTEGER[to])
    elif to in INTEGER:
        function = lambda a: a.astype(INTEGER[to])  # noqa: E731
    else:
        dtype = np.float32 if to in HALF else FLOAT[to]
        function = lambda a: (rounding or np.asarray)(a.astype(dtype))  # noqa: E731
    return elementwise(machine, ins, function, [of], to)


def _convert_pair(machine, ins, half):
    """Two fp32 to two halves in a register: the first operand is the upper one."""
    upper, lower = (machine.operand(arg, "f32") for arg in ins.args[1:])

    def run(mask):
        high, low = (encode(decode(get(), "f32"), half).astype(U32) for get in (upper, lower))
        machine.write(ins.args[0], high << U32(16) | low, mask)

    return run
