"""What happened before what: vector clocks (Mattern 1989) of a program's warps and of what works beside them.

Agents: each warp; each warpgroup's matrix products; each warp's copies in the background; the tensor copies of each
mbarrier. An access has its agent and that agent's clock. A warp may rely on it when the warp knows of that clock: from
its own order, from a barrier, or from waiting for the copies or products. Reads by matrix products and tensor copies
(the asynchronous proxy) also need a fence.proxy.async after what threads wrote.
"""

import numpy as np

MAX_MBARRIERS = 32


class Order:
    def __init__(self, warps):
        self.warps, groups = warps, -(-warps // 4)
        self.products = warps  # agents: the first of each kind
        self.copies = self.readers = warps + groups
        self.tensors = self.copies + warps
        agents = self.tensors + MAX_MBARRIERS
        self.clock = np.ones(agents, np.int32)
        self.known = np.zeros((2, warps, agents), np.int32)  # by threads, and through a fence by the asynchronous proxy
        self._tick(np.arange(warps))

    def name(self, agent):
        if agent < self.products:
            return f"warp {agent}"
        if agent < self.copies:
            return f"a product of warpgroup {agent - self.products}"
        return f"a copy of warp {agent - self.copies}" if agent < self.tensors else "a tensor copy"

    def release(self, warps):
        """What these warps know, to give to others; what they do from now on is not in it."""
        stamp = self.known[:, warps].max(1)
        self._tick(warps)
        return stamp

    def acquire(self, warps, stamp):
        self.known[:, warps] = np.maximum(self.known[:, warps], stamp[:, None])

    def fence(self, warps):
        self.known[1, warps] = np.maximum(*self.known[:, warps])
        self._tick(warps)

    def start(self, agent):
        """The clock of an agent's new piece of work."""
        self.clock[agent] += 1
        return int(self.clock[agent])

    def finish(self, warps, agent, clock):
        """These warps have waited for the agent's work up to that clock."""
        self.known[0, warps, agent] = np.maximum(self.known[0, warps, agent], clock)

    def of_threads(self):
        """(warps, agents): up to which clock of an agent each warp may rely on what is in memory."""
        return self.known[0]

    def of_proxy(self, warps):
        """(1, agents): the same for work that these warps together give to the asynchronous proxy. Tensor copies write
        through that proxy, so they need no fence."""
        seen, fenced = self.known[:, warps].min(1)
        return np.concatenate([fenced[: self.tensors], seen[self.tensors :]])[None]

    def seen_by(self, warps):
        """(1, agents): what all of these warps know."""
        return self.known[0, warps].min(0)[None]

    def _tick(self, warps):
        self.clock[warps] += 1
        self.known[0, warps, warps] = self.clock[warps]
