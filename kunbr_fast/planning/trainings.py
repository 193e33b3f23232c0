"""What the trainings of a run take: of all parameters, whole, streamed or sharded, and of a block."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from kunbr_fast.data.schedule import Schedule
from kunbr_fast.planning.context import Context, Taken, tokens_of
from kunbr_fast.planning.costs import Batch, Step, batches, forward_flops
from kunbr_fast.planning.layer_major import BUFFERS, Traffic, loads, one_pass, pass_memory, update_traffic
from kunbr_fast.planning.machines import Work
from kunbr_fast.planning.updates import STATES, Update

LOOKED_AT = 200  # steps of a stage whose batches are looked at one by one
CACHE_TOKENS = 4096  # default of PrefixCache


class Steps(NamedTuple):
    """whole: the batches of some of a training's steps; parts: their micro-batches; relearned: those of an adversary;
    count: of all its steps; retain: the most tokens of a step that are retained. trainings: of which they are."""

    whole: list[Batch]
    parts: list[Batch]
    relearned: list[Batch]
    count: int
    retain: int
    trainings: int = 1

    @property
    def longest(self) -> int:
        """Tokens of a step."""
        return max(batch.tokens for batch in self.whole)

    @property
    def many(self) -> bool:
        """Whether there are micro-batches."""
        return len(self.parts) > len(self.whole)

    @property
    def passes(self) -> float:
        """Of all steps."""
        return self.count * len(self.parts) / len(self.whole)


class Trainings(Context):
    """Each `Taken` is of one whole training."""

    # ------------------------------------------------ steps

    def steps_of(self, epochs: int) -> Steps:
        config, data = self.config, self.data
        sizes = len(data.forget), len(data.retain), config.batch_size, config.retain_size
        seed, adversary = config.seed * 1000, config.full_settings().adversary
        schedule = Schedule(*sizes, max(1, epochs), seed, adversary)
        objective, whole, passed, relearned = config.criterion(range(1)).objective, [], [], []
        most = 0
        for number in some(len(schedule)):
            forget, retain = schedule[number]
            sides = [data.forget[i] for i in forget] * (2 if objective.alternate else 1)
            sides = [sides, [data.retain[i] for i in retain if objective.retain]]
            whole.append(Batch.of(sides[0] + sides[1]))
            most = max(most, tokens_of(sides[1]))
            # with an adversary each side goes by itself, after what it relearns
            passed += [Batch.of(side) for side in sides if side] if adversary else [whole[-1]]
            relearned += [Batch.of([data.forget[i] for i in batch]) for batch in schedule.relearned(number)]
        parts, relearned = ([part for batch in found for part in self._cut(batch)] for found in (passed, relearned))
        return Steps(whole, parts, relearned, schedule.steps_per_epoch * epochs, most)

    def _cut(self, batch: Batch) -> list[Batch]:
        """Its micro-batches."""
        return list(batches(list(zip(batch.lengths, batch.labels)), self.config.micro_batch_tokens or batch.tokens))

    def _flops(self, steps: Steps, again: dict[str, Any] | None = None, **step: Any) -> float:
        """Of all steps. again: of what an adversary relearns, where that is another step."""
        flops = sum(Step(self.a, part, **step).flops() for part in steps.parts)
        flops += sum(Step(self.a, part, **(again or step)).flops() for part in steps.relearned)
        return steps.count * flops / len(steps.whole)

    def _temporary(self, update: Update, largest: int) -> int:
        """What plain torch makes within an update; a kernel nothing. AdamW is torch's own fused one."""
        if not self.setup.cpu or update.states == 2:
            return 0
        return largest * (8 if update.has_master else self.a.itemsize)

    # ------------------------------------------------ of all parameters

    def full(self, key: Any, steps: Steps, update: Update, fused: bool = True) -> Taken:
        if self.setup.stream:
            return self._full_streamed(key, steps, update, fused)
        step = dict(block=None, torch=self.setup.cpu, fused=fused, recompute=self.recompute)
        gpus = self.setup.gpus if self.sharded else 1
        if gpus > 1:
            steps = steps._replace(parts=[_share(part, gpus) for part in steps.parts])
        found = [*steps.parts, *steps.relearned]
        peak, flops = self.once((key, gpus), lambda: (self.pass_memory(found, **step), self._flops(steps, **step)))
        peak, a = dict(peak), self.a
        if steps.many:  # all gradients are there from the first part on
            peak |= {"gradient": update.weights, "workspace": peak["workspace"] + a.vocabulary * a.hidden * a.itemsize}
        points = [peak, {"gradient": update.weights, "workspace": self._temporary(update, a.largest)}]
        top = max(points, key=lambda point: sum(point.values()))
        memory = {"weights": update.weights, "optimiser": update.state, "master": update.master_bytes, **top}
        traffic = self._passed(steps, a.layers, peak) + steps.count * update.traffic
        if gpus == 1:
            return Taken(memory, [Work(flops, traffic)])
        return self._sharded(Taken(memory, [Work(flops, traffic)]), steps, gpus)

    def _sharded(self, taken: Taken, steps: Steps, gpus: int) -> Taken:
        """By `fully_shard`, layer by layer: each GPU has its part of the layers' weights and gradient, and of all
        optimiser state; two layers' weights and one's gradient as a whole, and that in fp32 to be summed."""
        a, memory, others = self.a, dict(taken.memory), (gpus - 1) / gpus
        inside, wide = a.layers * a.layer / a.parameters, max(4, a.itemsize)
        for kind, part in dict(weights=inside, gradient=inside, optimiser=1.0, master=1.0).items():
            memory[kind] = round(memory[kind] * (1 - part * others))
        memory["layer buffers"] = 3 * self.layer + a.layer * wide
        summed = steps.passes * a.layers * a.layer * wide + 2 * steps.count * a.outside * wide
        link = others * (2 * steps.passes * a.layers * self.layer + summed + steps.count * a.outside * a.itemsize)
        return dataclasses.replace(taken, memory=memory, work=[dataclasses.replace(taken.work[0], link=link)])

    def _full_streamed(self, key: Any, steps: Steps, update: Update, fused: bool) -> Taken:
        """Up and down for all micro-batches; on the way down each layer is updated, and goes back."""
        a, cpu, n = self.a, self.setup.cpu, self.streamed(0, self.a.layers)
        one, outside, table = update.of(a.layer), update.of(a.outside), a.vocabulary * a.hidden * a.itemsize
        peak, flops = self._streamed_passes(key, steps, None, many=steps.many, fused=fused)
        # a state is made beside the buffers, in the first step
        points = [peak, {"gradient": one.weights + table * a.tied, "workspace": one.kept}]
        points[-1]["workspace"] += self._temporary(update, a.largest_matrix)
        peak = max(points, key=lambda point: sum(point.values()))
        here, host, moved = self._waiting(a.layers, steps)
        memory = {**self.weights(), "optimiser": outside.state, "master": outside.master_bytes, **peak}
        memory["activations"] = peak.get("activations", 0) + here
        memory["resident"] += self.stays * one.kept
        memory["layer buffers"] += BUFFERS * one.kept * (n > 0 and not cpu)  # a CPU updates a state where it lies
        files = self.in_files(one.kept)
        first = (one_pass(n) + self.stays) * steps.trainings * self.layer  # from the model's files
        resident = Traffic(weights_in=self.stays * steps.trainings * self.layer)
        traffic = update_traffic(n, one.weights, one.kept, steps.count, steps.trainings) + resident
        work = Work(
            flops, self._passed(steps, a.layers, peak) + steps.count * update.traffic,
            traffic.weights_in + traffic.state_in, traffic.weights_out + traffic.state_out,
            files * (traffic.total - first),
        )  # fmt: skip
        if cpu:  # what is outside, as it was before
            memory["weights"] += outside.weights
        else:
            host += outside.weights + BUFFERS * one.kept * (n > 0)  # these pinned, on the way
            host += a.tied * steps.many * table * round(len(steps.parts) / len(steps.whole))  # the head's gradients
        work = [Work(disk=first), *self.phases(work + moved, traffic, n / a.layers, 1 / 4, files)]
        return Taken(memory, work, traffic, host, n * (one.weights + one.kept), one.weights + one.kept)

    def _streamed_passes(
        self, key: Any, steps: Steps, block: range | None, many: bool, fused: bool
    ) -> tuple[dict[str, int], float]:
        """(memory of the largest pass, FLOPs of all steps)"""
        how = dict(torch=self.setup.cpu, fused=fused)

        def memory(part: Batch) -> dict[str, int]:
            return pass_memory(self.a, part, block, many=many, **how)

        found = [*steps.parts, *steps.relearned]
        return self.once(
            key, lambda: (self.worst(found, memory), self._flops(steps, block=block, recompute=True, **how))
        )

    def _waiting(self, layers: int, steps: Steps) -> tuple[int, int, Work]:
        """(bytes of the device, of main memory, what is moved) of the activations that wait between two layers."""
        waiting = layers * steps.longest * self.a.hidden * self.a.itemsize
        return *self.placed(waiting), self.moved(2 * waiting, 3 * waiting).times(steps.count)

    def _passed(self, steps: Steps, layers: int, peak: dict[str, int]) -> float:
        """Bytes of the device's memory that all passes read and write."""
        return steps.passes * (2 * layers * self.layer + 2 * sum(peak.values()))

    def adapters(self, key: Any, steps: Steps, rank: int) -> Taken:
        """LoRA's, in fp32 with gradients and AdamW's moments, on every matrix of a streamed model. Each step all layers
        come anew, those that stay too, to be merged with the adapters; one layer's gradient is there at a time."""
        a, n = self.a, self.streamed(0, self.a.layers)
        peak, flops = self._streamed_passes(key, steps, range(a.layers), many=False, fused=False)
        peak = peak | {"gradient": self.layer}
        points = [peak, {"gradient": self.layer, "workspace": 16 * a.largest_matrix}]  # a merge in fp32
        peak = max(points, key=lambda point: sum(point.values()))
        here, host, moved = self._waiting(a.layers, steps)
        memory = {**self.weights(), **peak, "activations": peak.get("activations", 0) + here}
        memory["optimiser"] = 16 * rank * a.layers * (a.rows + a.columns)
        files = self.in_files()
        passes = steps.count + steps.trainings  # one looks at what the last step has left
        anew, more = self.read(self.stays * passes, anew=self.stays * steps.trainings)
        read, traffic = self.read(one_pass(n) * passes)
        work = Work(flops, self._passed(steps, a.layers, peak)) + read + moved
        work = [anew, Work(disk=n * self.layer), *self.phases(work, traffic, n / a.layers, 1 / 4, files)]
        return Taken(memory, work, traffic + more, host, a.layers * self.layer, self.layer)

    def warm_up(self) -> Taken:
        a, config = self.a, self.config
        epochs = config.warmup_epochs
        steps = self.once(("steps", epochs), lambda: self.steps_of(epochs))
        update = Update(a.parameters, STATES[config.warmup_optimizer], a.itemsize, config.warmup_master_weights)
        taken = self.full(("warm-up", epochs), steps, update)
        kept, host = self.placed(self.states_bytes(self.states_layers))
        taken.memory["hidden states"], taken.host = kept, taken.host + host
        taken.memory["activations"] = taken.memory.get("activations", 0) + self._differences(None, steps)
        if config.adversary_every:  # its weights and AdamW's moments
            taken.memory["adversary"] = update.weights + dataclasses.replace(update, states=2).state
        return taken

    # ------------------------------------------------ what is compared with the original's

    def compared(self, block: range | None) -> list[int]:
        """The layers whose outputs a training compares with the original's."""
        hidden = self.config.criterion(block, warmup=block is None).hidden
        return [] if hidden is None else hidden.chosen(self.a.layers, block)

    @property
    def states_layers(self) -> list[int]:
        """Those whose outputs are kept: without a warm-up none below the lowest block, which may be the first one."""
        return self.compared(range(self.a.layers)) or ([] if self.setup.unlearned else self.compared(None))

    def states_bytes(self, layers: Sequence[int]) -> int:
        return len(layers) * tokens_of(self.data.retain) * self.a.hidden * self.a.itemsize

    def _differences(self, block: range | None, steps: Steps) -> int:
        """Bytes of those that wait for the backward pass."""
        layers = 1 if self.setup.stream else len(self.compared(block))
        tokens = min(steps.retain, max(part.tokens for part in steps.parts))
        return bool(self.compared(block)) * layers * tokens * self.a.hidden * self.a.itemsize

    # ------------------------------------------------ of a block

    def block(self, block: range, chance: float = 1.0) -> Taken:
        """chance: that the block is one of the chosen ones."""
        a, config, setup = self.a, self.config, self.setup
        epochs = config.block_epochs
        steps = self.once(("steps", epochs), lambda: self.steps_of(epochs))
        update = Update(
            len(block) * a.layer, STATES[config.optimizer], a.itemsize, config.master_weights,
            config.optimizer_device == "host" and not setup.cpu,
        )  # fmt: skip
        peak, flops = self.once(("passes", block, epochs), lambda: self._block_passes(block, steps))
        given = steps.longest * a.hidden * a.itemsize  # the block's input
        fixed, host = self._fixed(block, update)
        peak = peak | {"activations": peak["activations"] + self._differences(block, steps) + given}
        points = [peak, {"workspace": self._temporary(update, update.entries), "activations": given}]
        points.append({"workspace": update.weights, "activations": given})  # the trained block as it leaves
        top = max(points, key=lambda point: sum(point.values()))
        above = a.layers - (block.stop if setup.stream else block.start)
        work = [Work(flops, self._passed(steps, above, peak) + steps.count * update.traffic * (not update.on_host))]
        traffic = Traffic()
        if setup.stream:
            here, beside, waiting = self._waiting(a.layers - block.start, steps)
            top["activations"] += here
            host += beside + update.weights * (not setup.cpu)  # the trained block, when it is taken out
            moved, traffic = self._cover(block, steps, fixed)
            part = 6 * self.streamed(block.stop, a.layers) / (6 * (a.layers - block.stop) + 8 * len(block))
            work = self.phases(work[0] + moved + waiting, traffic, part, 1 / 3, self.in_files())
        if update.on_host:  # gradient down, update, weights up, one after the other
            moved = steps.count * update.weights
            work += [Work(bus_out=moved), Work(host=steps.count * update.traffic), Work(bus_in=moved)]
        memory = {kind: fixed.get(kind, 0) + top.get(kind, 0) for kind in dict.fromkeys((*fixed, *top))}
        prefix, prefix_traffic = self._prefix(min(block.start, len(block)) / chance, epochs)
        kept = a.layers * self.layer * setup.stream
        return Taken(memory, work + prefix, traffic + prefix_traffic, host, kept, self.layer)

    def _cover(self, block: range, steps: Steps, fixed: dict[str, int]) -> tuple[Work, Traffic]:
        """What streaming the layers above the block moves. One in low precision is read once, and twice more to be
        compared, and lies on the device; `fixed` then has it."""
        a, n, precision = self.a, self.streamed(block.stop, self.a.layers), self.config.cover_precision
        if precision == "none":
            return self.read(loads(n, steps.count))
        # with fp32 scales
        weights = a.matrices // 2 + a.matrices // 16 if precision == "nf4" else a.matrices + 4 * a.rows
        fixed["cover"] = (a.layers - block.stop) * (weights + (a.layer - a.matrices) * a.itemsize)
        fixed["cover"] += a.largest_matrix * a.itemsize  # one weight, written out
        return self.read(n + one_pass(n))

    def _block_passes(self, block: range, steps: Steps) -> tuple[dict[str, int], float]:
        """(memory of the largest pass, FLOPs of all steps)"""
        a, cpu = self.a, self.setup.cpu
        last = a.layers - 1 in self.compared(block)  # its output is then needed whole
        step = dict(block=block, start=block.start, torch=cpu, recompute=self.recompute, rows_last=not last)
        again = step | {"block": None, "start": 0} if self._reaches_model else step
        flops = self._flops(steps, again, **step)
        if self.setup.stream:
            found = [*steps.parts, *steps.relearned]
            return self.worst(found, lambda part: pass_memory(a, part, block, torch=cpu, many=False)), flops
        found = [self.pass_memory(steps.parts, **step)]
        if steps.relearned:
            found.append(self.pass_memory(steps.relearned, **again))
        return max(found, key=lambda memory: sum(memory.values())), flops

    @property
    def _reaches_model(self) -> bool:
        return self.config.block_settings().reaches_model

    def _fixed(self, block: range, update: Update) -> tuple[dict[str, int], int]:
        """(bytes by kind, bytes of main memory) that stay for a block's whole training."""
        fixed, cpu = {**self.weights(), "optimiser": update.state}, self.setup.cpu
        fixed["hidden states"], host = self.placed(self.states_bytes(self.states_layers))
        if self.config.adversary_every:  # its weights and AdamW's moments
            moments = dataclasses.replace(update, states=2).state
            fixed["adversary"] = update.weights + update.master_bytes + moments
            if self._reaches_model:
                fixed["adversary"] = 3 * self.a.parameters * self.a.itemsize
        fixed |= {"block copy": update.weights, "gradient": update.weights, "master": update.master_bytes}
        if cpu and update.has_master and update.states == 2:
            fixed["gradient"] += 4 * update.entries  # torch's AdamW reads an fp32 one, which stays
        fixed["prefix cache"], beside = self.placed(self._cache_bytes)
        host += beside
        if update.on_host:
            host += 2 * update.weights + update.kept
            if "adversary" in fixed and not self._reaches_model:  # of its weights one copy is on the device
                host += fixed["adversary"]
                fixed["adversary"] = update.weights
            fixed |= {"master": 0, "optimiser": 0}
        return fixed, host

    @property
    def _cache_bytes(self) -> int:
        return tokens_of(self.data.forget + self.data.retain) * self.a.hidden * self.a.itemsize

    def _prefix(self, layers: float, epochs: int) -> tuple[list[Work], Traffic]:
        """The cache is rolled forward through so many layers, once for all blocks, and read each epoch."""
        cut = self.once("cache", lambda: list(batches(self.data.forget + self.data.retain, CACHE_TOKENS)))
        flops = self.once("cache flops", lambda: sum(forward_flops(self.a, part, 1) for part in cut)) * layers
        streamed = layers * self.streamed(0, self.a.layers) / self.a.layers
        read, traffic = self.read(streamed * self.setup.stream)
        once = self._cache_bytes
        return [Work(flops, layers * self.layer) + read + self.moved(once, once), self.moved(0, epochs * once)], traffic


def some(count: int, parts: int = 1) -> range:
    """Evenly spread numbers below count, LOOKED_AT / parts at most."""
    return range(0, count, -(-count * parts // LOOKED_AT))


def _share(batch: Batch, gpus: int) -> Batch:
    """The samples of one GPU."""
    return Batch(batch.lengths[::gpus], batch.labels[::gpus])
