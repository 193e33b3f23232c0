"""Where threads that went different ways meet again: the nearest instruction that every way from a branch leads to."""


def _successors(code):
    """Of each instruction, by index; len(code) is the end."""
    end, out = len(code), []
    for at, instruction in enumerate(code):
        target = {"bra": instruction.args[0] if instruction.args else None, "ret": end, "exit": end}.get(instruction.op)
        falls_through = [] if target is not None and instruction.guard is None else [at + 1]
        out.append(falls_through if target is None else [target, *falls_through])
    return out


def _order_from_end(successors):
    """Instructions in the order in which a walk from the end, against the arrows, leaves them."""
    before = [[] for _ in range(len(successors) + 1)]
    for at, targets in enumerate(successors):
        for target in targets:
            before[target].append(at)
    end = len(successors)
    order, seen, stack = [], {end}, [(end, iter(before[end]))]
    while stack:
        at, rest = stack[-1]
        new = next((other for other in rest if other not in seen), None)
        if new is None:
            order.append(at)
            stack.pop()
        else:
            seen.add(new)
            stack.append((new, iter(before[new])))
    return order


def meeting_points(code):
    """For each instruction its immediate post-dominator (Cooper, Harvey, Kennedy 2001); None where that is the end."""
    successors, end = _successors(code), len(code)
    order = _order_from_end(successors)
    number = {at: i for i, at in enumerate(order)}
    nearest = {end: end}

    def common(a, b):
        while a != b:
            while number[a] < number[b]:
                a = nearest[a]
            while number[b] < number[a]:
                b = nearest[b]
        return a

    changed = True
    while changed:
        changed = False
        for at in reversed(order[:-1]):
            known = [target for target in successors[at] if target in nearest]
            new = known[0]
            for other in known[1:]:
                new = common(other, new)
            changed |= nearest.get(at) != new
            nearest[at] = new
    return [nearest[at] if nearest.get(at, end) != end else None for at in range(end)]
