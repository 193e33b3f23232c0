"""Memory, FLOPs, bytes over the bus and seconds of each stage of a run with given settings.

Memory is that of the accelerator, or on a CPU of the process above Python and its libraries. Time is the longest of
arithmetic, memory traffic, bus and disk, each at a stated share of its rate. Tokenising, launches and what the run
writes to its folder are left out.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator, Sequence

from kunbr_fast.data.schedule import Schedule
from kunbr_fast.density.measure import COMPARING
from kunbr_fast.evaluation.attacks import ATTACKS, Kind
from kunbr_fast.evaluation.probability import BATCH_TOKENS
from kunbr_fast.evaluation.rtt import RTTConfig
from kunbr_fast.parallel.assign import SHARING_COSTS, spread_blocks
from kunbr_fast.planning.context import Stage, Taken
from kunbr_fast.planning.costs import Batch, Step, batches, forward_extra, forward_flops
from kunbr_fast.planning.layer_major import BUFFERS, Traffic, one_pass, pass_memory
from kunbr_fast.planning.machines import Work
from kunbr_fast.planning.trainings import CACHE_TOKENS, Steps, Trainings, some
from kunbr_fast.planning.updates import STATES, Update

DENSITY_TOKENS = 2048  # knowledge_density's default
# What the other choices and candidates of a question take besides its own text, in tokens: 12 of Years' questions.
BRANCHES = 12


class Run(Trainings):
    """The stages of one run with given settings, on each GPU of the setup."""

    def stages(self) -> list[Stage]:
        found = [self.evaluation(3)] if self.data.questions or self.data.answers else []
        if self.states_bytes(self.states_layers):
            found.append(self.states())
        if not self.setup.unlearned:
            found.append(self.stage("warm-up", self.warm_up()))
        found.append(self.density())
        config = self.config
        blocks = config.selectable(self.a.layers)
        for block in blocks:
            chance = config.top_k / len(blocks) if config.rule == "top_k" else 1.0
            stage = self.stage(f"re-insertion {block.start}-{block.stop - 1}", self.block(block, chance))
            found.append(dataclasses.replace(stage, runs=config.rounds * chance))
        found += [self.attack()] if self.data.folds else []
        return self._divided(found) if self.setup.gpus > 1 else found

    def _divided(self, stages: list[Stage]) -> list[Stage]:
        """Over several GPUs, as `parallel` does: blocks are dealt out, samples of warm-up and density are spread,
        attacks are dealt out unless all GPUs make each, and each GPU evaluates for itself."""
        gpus, attacks = self.setup.gpus, sum(s.runs for s in stages if s.name == "RTT attack") * len(self.data.folds)
        costs = [stage.seconds for stage in stages if stage.of_block]
        alone, together = spread_blocks(costs, gpus, 1 / gpus, self.config.parallel)
        longest = max(sum(costs[i] for i in part) for part in alone)
        longest += sum(costs[i] for i in together) * SHARING_COSTS / gpus
        block = longest / sum(costs) if costs else 1.0
        shares = {"warm-up": SHARING_COSTS / gpus, "density": 1 / gpus, "evaluation": 1, "hidden states": 1}
        shares["RTT attack"] = -(-attacks // gpus) / attacks if attacks else 1.0
        if self.sharded:  # their work is that of one GPU
            shares |= {"warm-up": SHARING_COSTS, "RTT attack": SHARING_COSTS}
        return [dataclasses.replace(s, runs=s.runs * (block if s.of_block else shares[s.name])) for s in stages]

    def enough_blocks(self, memory: int) -> int | None:
        """The smallest num_blocks whose blocks can be trained within so many bytes."""

        def fits(number: int) -> bool:
            run = dataclasses.replace(self, config=dataclasses.replace(self.config, num_blocks=number))
            return run.stage("", run.block(range(self.a.layers // number))).peak <= memory

        numbers = range(self.a.layers + 1)
        found = bisect.bisect_left(numbers, True, self.config.num_blocks + 1, key=fits)
        return found if found in numbers else None

    # ------------------------------------------------ stages without a training

    def states(self) -> Stage:
        """One forward pass of the original over the retain set."""
        layers, cut = max(self.states_layers) + 1, list(batches(self.data.retain, CACHE_TOKENS))
        kept = self.states_bytes(self.states_layers)
        here, host = self.placed(kept)
        memory = {"hidden states": here, "activations": max(forward_extra(self.a, part) for part in cut)}
        flops = sum(forward_flops(self.a, part, layers) for part in cut)
        read, traffic = self._forward(layers, sum(part.tokens for part in cut), memory)
        work = Work(flops, layers * len(cut) * self.layer) + read + self.moved(kept, 0)
        taken = Taken({**self.weights(), **memory}, [work], traffic, host, resident=self.layer)
        return self.stage("hidden states", taken)

    def _forward(self, layers: int, tokens: int, memory: dict[str, int]) -> tuple[Work, Traffic]:
        """What a streamed model's one pass up moves: layers that nothing has read before, and what waits between two of
        them, for which `memory` has room then."""
        if not self.setup.stream:
            return Work(), Traffic()
        waiting = tokens * self.a.hidden * self.a.itemsize
        memory["activations"] += self.placed(waiting)[0]
        read, traffic = self.read(layers, anew=layers)
        return read + self.moved(layers * waiting, 2 * layers * waiting), traffic

    def density(self) -> Stage:
        a, config, cpu = self.a, self.config, self.setup.cpu
        sets = [self.data.forget, *[self.data.retain] * (config.statistic in COMPARING)]
        parts = self.once("density batches", lambda: [list(batches(data, DENSITY_TOKENS)) for data in sets])
        found = [batch for part in parts for batch in part]
        step = dict(block=None, torch=cpu, fused=False, taps=True, rows_last=False, recompute=self.recompute)
        work, traffic, host = Work(), Traffic(), 0
        if self.setup.stream:
            peak = self.once(
                "density",
                lambda: self.worst(
                    found, lambda part: pass_memory(a, part, None, torch=cpu, many=False, taps=True, fused=False)
                ),
            )
            count = self.streamed(0, a.layers)
            # all from the files once; of each set a pass, and slug looks at the weights themselves
            loads = len(sets) * one_pass(count) + count * (config.statistic == "slug")
            work, traffic = self.read(loads + self.stays, anew=count + self.stays)
            waiting = a.layers * a.hidden * a.itemsize * max(sum(batch.tokens for batch in part) for part in parts)
            here, host = self.placed(waiting)
            work += self.moved(2 * len(sets) * waiting, 3 * len(sets) * waiting)
            peak = peak | {"activations": peak["activations"] + here}
        else:
            peak = dict(self.once("density", lambda: self.pass_memory(found, **step)))
        if config.reduction == "mean":
            held = 1 + (len(sets) > 1 and len(parts[-1]) > 1)  # the mean gradients of the sets
            peak = peak | {"gradient": peak["gradient"] + 4 * held * a.layers * 3 * a.hidden * a.intermediate}
        flops = self.once("density flops", lambda: sum(Step(a, batch, **step).flops() for batch in found))
        work += Work(flops, 2 * len(found) * a.layers * self.layer)
        kept = a.layers * self.layer * self.setup.stream
        work = self.phases(work, traffic, 1.0, 1 / 4, 0.0)
        return self.stage("density", Taken({**self.weights(), **peak}, work, traffic, host, kept, self.layer))

    # ------------------------------------------------ accuracy

    def _asked(self, questions: Sequence[int]) -> Iterator[Batch]:
        """A question goes through the model once, with its choices as branches."""
        by_choice = self.config.scoring == "choice"
        asked = [(n + BRANCHES, n // 2) if by_choice else (n, 1) for n in questions]
        return batches(asked, BATCH_TOKENS)

    def answering(self, key: str, questions: Sequence[int], answers: Sequence[tuple[int, int]] = ()) -> Taken:
        """Of measuring accuracy, or the probability of answers, once: all in one pass, of a streamed model too."""
        a = self.a
        found = self.once(key, lambda: [*self._asked(questions), *batches(answers, BATCH_TOKENS)])
        flops = self.once((key, "flops"), lambda: sum(forward_flops(a, batch, a.layers, batch.rows) for batch in found))
        logits = max(min(batch.rows * a.vocabulary * 4, 256 << 20) for batch in found)
        memory = {"activations": max(forward_extra(a, batch) for batch in found), "head": 2 * logits}
        tokens = sum(batch.tokens for batch in found)
        read, traffic = self._forward(a.layers, tokens, memory)
        host = self.placed(tokens * a.hidden * a.itemsize)[1] * self.setup.stream
        work = Work(flops, a.layers * len(found) * self.layer) + read
        return Taken({**self.weights(), **memory}, [work], traffic, host, resident=self.layer)

    def evaluation(self, times: int) -> Stage:
        asked = self.data.questions, self.data.answers
        return dataclasses.replace(self.stage("evaluation", self.answering("asked", *asked)), runs=times)

    # ------------------------------------------------ the attack

    def attack(self) -> Stage:
        """The mean of all attacks at a learning rate: training for each fold (one for all, where none is used), and the
        questions of all folds after each epoch."""
        config, folds = self.config, self.data.folds
        others = [[sample for k, fold in enumerate(folds) if k != i for sample in fold] for i in range(len(folds))]
        samples = [sample for fold in folds for sample in fold]
        asked = ([], samples) if self.data.by_answers else ([tokens for tokens, _ in samples],)
        before = self.answering("attacked", *asked)
        found, work, traffic, runs = [before], [*before.work], before.traffic, 0
        for kind in map(ATTACKS.get, config.rtt_attacks):
            lrs, times = len(kind.lrs(config.rtt_lrs)), len(kind.measured(config.rtt_epochs)) - 1
            sets = [] if kind.rounds else [self.data.retain] if kind.others else others
            taken = self._attacked(kind, sets) if sets else Taken({}, [])
            asked, moved = self._asked_again(kind, before.work[0], times)
            found.append(taken)
            work += [part.times(lrs) for part in (*taken.work, asked)]
            traffic += (taken.traffic + moved).times(lrs)
            runs += lrs
        worst = max(found, key=lambda taken: sum(taken.memory.values()))
        most = {name: max(getattr(taken, name) for taken in found) for name in ("host", "store", "resident")}
        taken = Taken(worst.memory, [part.times(1 / runs) for part in work], traffic.times(1 / runs), **most)
        return dataclasses.replace(self.stage("RTT attack", taken), runs=runs)

    def _asked_again(self, kind: Kind, before: Work, times: int) -> tuple[Work, Traffic]:
        """The questions of all folds, so many times after an epoch: each fold after its own training, or all after one.
        before: what they take all together."""
        work = before.times(times)
        if not self.setup.stream:
            return work, Traffic()
        streamed, trains = self.streamed(0, self.a.layers), kind.trains_all
        # rounding changes every layer anew; of a training's last step the lowest layers are in place
        count = self.a.layers if kind.rounds else streamed * times - min(streamed, BUFFERS)
        count *= 1 if kind.at_once else len(self.data.folds)
        beside = self._attacker(kind.optimizer or RTTConfig().optimizer).of(self.a.layer).kept * trains
        read, traffic = self.read(count, beside=beside)
        return dataclasses.replace(work, bus_in=read.bus_in, disk=read.disk), traffic

    def _attacked(self, kind: Kind, sets: Sequence[list[tuple[int, int]]]) -> Taken:
        """An attack at a learning rate, on each of the sets."""
        key = "attack", kind.passes, kind.others
        steps = self.once(key, lambda: self._fine_tuning(sets, kind.passes))
        if kind.adapters and self.setup.stream:
            return self.adapters((*key, "adapters"), steps, self.config.rtt_lora_rank)
        update = self._attacker(kind.optimizer or RTTConfig().optimizer)
        return self.full((*key, "passes"), steps, update, fused=False)

    def _attacker(self, optimizer: str) -> Update:
        return Update(self.a.parameters, STATES[optimizer], self.a.itemsize, self.config.rtt_master_weights)

    def _fine_tuning(self, sets: Sequence[list[tuple[int, int]]], passes: int) -> Steps:
        """Of a training on each of the sets."""
        config, found, count = self.config, [], 0
        for samples in sets:
            schedule = Schedule(len(samples), 0, config.rtt_batch_size, 1, passes * config.rtt_epochs, config.seed)
            found += [Batch.of([samples[k] for k in schedule[at][0]]) for at in some(len(schedule), len(sets))]
            count += len(schedule)
        return Steps(found, found, [], count, 0, len(sets))
