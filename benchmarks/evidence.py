"""Does forgetting last? Methods with searched settings, under attacks that were rehearsed and others, over seeds.

    python benchmarks/evidence.py --world demo --jobs 2
    python benchmarks/evidence.py --world smollm2 --data FOLDER_OF_RANDOM_BIRTHDAYS --hours 10

1. Search, on one seed: as many settings of every method, one written rule (`forgetting.summary.RULE`).
2. Each method's chosen setting on the other seeds, under the attack that may have been rehearsed.
3. The main methods under every other kind of attack; what counts is the strongest one.

A unit is one training with its attacks, in files of its own under --out: a killed run goes on where it was, in the
middle of an attack too. Tables, CSV and pictures are made of all that is finished, also by `--limit 0`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from kunbr_fast.benchmarks.forgetting import birthdays, pictures, summary
from kunbr_fast.benchmarks.forgetting.methods import METHODS, YARDSTICK
from kunbr_fast.benchmarks.forgetting.units import REHEARSED, WORLDS, Place, Unit, world_of
from kunbr_fast.evaluation.attacks import ATTACKS
from kunbr_fast.files.atomic import atomic_write
from kunbr_fast.files.lock import hold

SEARCH_SEED = 10
ABLATIONS = {"random_blocks": "kunbr", "no_reinsertion": "kunbr"}  # with the setting that was chosen for these


class Evidence:
    """The phases of a run, each a list of units that need not be made in order."""

    def __init__(
        self, place: Place, methods: Sequence[str], seeds: Sequence[int], settings: int, attacks: Sequence[str]
    ):
        self.place, self.methods, self.seeds, self.settings = place, methods, seeds, settings
        self.wide = [kind for kind in ATTACKS if kind in {REHEARSED, *attacks}]

    def search(self, attacked: bool = False) -> dict[str, list[Unit]]:
        """All settings, on the seed of the search."""
        found = {}
        for method in self.methods:
            if method not in ABLATIONS and method != YARDSTICK:
                number = min(self.settings, len(METHODS[method].settings(world_of(self.place, SEARCH_SEED))))
                kinds = (REHEARSED,) if attacked else ()
                found[method] = [Unit(self.place, method, n, SEARCH_SEED, kinds) for n in range(number)]
        return found

    def picked(self) -> dict[str, int]:
        """The number of each method's chosen setting; without those that have none yet."""
        search = self.search(True)
        found = {method: unit.number for method, units in search.items() if (unit := self._chosen(units)) is not None}
        found |= {method: found[of] for method, of in ABLATIONS.items() if method in self.methods and of in found}
        return found | ({YARDSTICK: 0} if YARDSTICK in self.methods else {})

    def _chosen(self, units: Sequence[Unit]) -> Unit | None:
        if any(unit.trained is None for unit in units) or any(unit.missing for unit in summary.candidates(units)):
            return None
        return summary.chosen(units)

    def tested(self, wide: bool = False) -> dict[str, list[Unit]]:
        """The chosen settings on the seeds; with wide, under every kind of attack where the method is."""
        picked, found = self.picked(), {}
        for method in self.methods:
            if method in picked:
                kinds = tuple(self.wide) if wide and METHODS[method].wide else (REHEARSED,)
                found[method] = [Unit(self.place, method, picked[method], seed, kinds) for seed in self.seeds]
        return found

    def phases(self) -> Iterator[tuple[str, list[Unit]]]:
        """Each is made when the one before is finished."""
        yield "search", _flat(self.search())
        search = self.search(True)
        yield "search, attacks", [u for units in search.values() for u in summary.candidates(units)]
        yield "seeds", sorted(_flat(self.tested()), key=lambda unit: unit.seed)
        yield "other attacks", sorted(_flat(self.tested(True)), key=lambda unit: unit.seed)

    def seconds(self, sample: float, question: float) -> float:
        """What all of it takes at most, where training on a sample and asking a question take so long."""
        known = self.search(True)
        units = [(unit, [REHEARSED]) for unit in _flat(known)]
        for method in self.methods:
            kinds = self.wide if METHODS[method].wide else [REHEARSED]
            units += [(Unit(self.place, method, 0, seed), kinds) for seed in self.seeds]
        work = [unit.work(["trained", *kinds]) for unit, kinds in units]
        world = world_of(self.place, SEARCH_SEED)
        taught = sum(map(len, world.records.values())) * world.teaching["epochs"] * (1 + len(self.seeds))
        return sample * (taught + sum(samples for samples, _ in work)) + question * sum(asked for _, asked in work)

    # ------------------------------------------------ what is said

    def report(self, csv: Path) -> str:
        """Writes table, CSV and pictures of what is finished; returns the tables."""
        search, tested = self.search(True), self.tested(True)
        picked = set(self.picked().items())
        rows = summary.csv_rows("search", _flat(search), picked, self.wide)
        rows += summary.csv_rows("seeds", _flat(tested), picked, self.wide)
        if not rows:
            return "nothing is finished yet"
        summary.write_csv(csv, rows)
        text = (
            f"Search, seed {SEARCH_SEED}, smooth accuracies. Chosen: {summary.RULE}.\n\n{summary.search_table(search)}"
        )
        if any(unit.result(REHEARSED) for unit in _flat(tested)):
            text += f"\n\nSeeds {', '.join(map(str, self.seeds))}, plain / smooth ± standard error over seeds.\n\n"
            text += summary.main_table(tested, self.wide)
            text += f"\n\nEach kind of attack, smooth.\n\n{summary.attack_table(tested, self.wide)}"
            pictures.draw(tested, self.wide, self.place.out)
        with atomic_write(self.place.out / "tables.md") as file:
            file.write(f"{text}\n".encode())
        return text


def _flat(units: dict[str, list[Unit]]) -> list[Unit]:
    return [unit for of in units.values() for unit in of]


# ---------------------------------------------------------------- running units


class Runner:
    """Runs units by `jobs` processes. limit: seconds after which none is begun."""

    def __init__(self, jobs: int, limit: float):
        self.jobs, self.limit, self.begin = jobs, limit, time.monotonic()
        self.failed: list[str] = []

    @property
    def late(self) -> bool:
        return time.monotonic() - self.begin >= self.limit

    def run(self, phase: str, units: Sequence[Unit]) -> bool:
        """Whether all are finished afterwards."""
        left = [unit for unit in units if unit.missing]
        costs = {unit: sum(unit.work()) for unit in left}
        begin, total, done = time.monotonic(), sum(costs.values()), 0.0
        for number, (unit, error) in enumerate(self._finished(left), start=1):
            done += costs[unit]
            took = time.monotonic() - begin
            what = f"FAILED: {error}" if error else _said(unit)
            rest = f"{number / took * 60:.1f} a minute, {(total - done) / done * took / 60:.0f} min left"
            print(f"[{phase} {number}/{len(left)}] {unit.name}: {what}  ({rest})", flush=True)
            self.failed += [unit.name] * bool(error)
        return not any(unit.missing for unit in units)

    def _finished(self, left: Sequence[Unit]) -> Iterator[tuple[Unit, Exception | None]]:
        """Each unit once it is finished, with what went wrong."""
        if self.jobs == 1:
            for unit in left:
                if self.late:
                    return
                yield unit, _tried(unit)
            return
        queue, running = list(left), {}
        fresh = multiprocessing.get_context("spawn")
        how = dict(mp_context=fresh, initializer=torch.set_num_threads, initargs=(1,))
        with concurrent.futures.ProcessPoolExecutor(self.jobs, **how) as pool:
            while True:
                while queue and len(running) < self.jobs and not self.late:
                    unit = queue.pop(0)
                    running[pool.submit(_tried, unit)] = unit
                if not running:
                    return
                for future in concurrent.futures.wait(running, return_when="FIRST_COMPLETED").done:
                    yield running.pop(future), future.result()


def _tried(unit: Unit) -> Exception | None:
    """Runs it; one that fails does not hold up the others."""
    try:
        unit.run()
    except Exception as error:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return None


def _said(unit: Unit) -> str:
    if "diverged" in unit.trained:
        return "diverged"
    groups = ", ".join(f"{group} {summary.damage(unit, group):.1f}" for group in ("forget", "retain", "bystanders"))
    found = summary.strength(unit, unit.kinds) if unit.kinds else None
    return groups + (f", {found[1]} {found[0]:.1f}" if found else "")


# ---------------------------------------------------------------- the command

NIGHT = dict(  # what is asked of SmolLM2 on a CPU
    seeds=[1],
    settings=3,
    methods="gradient_difference npo kunbr kunbr_cumulative robust robust_blocks never".split(),
    attacks="full lora other_facts nf4".split(),
)
WHOLE = dict(seeds=[1, 2, 3, 4, 5], settings=5, methods=list(METHODS), attacks=list(ATTACKS))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--world", choices=list(WORLDS), default="demo")
    add("--seeds", type=int, nargs="+", help=f"other than {SEARCH_SEED} [1 to 5; smollm2 on a CPU: 1]")
    add("--methods", nargs="+", choices=list(METHODS), metavar="NAME", help=f"of {', '.join(METHODS)} [all]")
    add("--settings", type=int, metavar="N", help="that are tried of each method [5; smollm2 on a CPU: 3]")
    add("--attacks", nargs="+", choices=list(ATTACKS), metavar="KIND", help="kinds that the main methods meet [all]")
    add("--out", type=Path, default=Path("runs/evidence"), help="what is measured [runs/evidence]")
    add("--csv", type=Path, help="rows of all that is finished [OUT/evidence.csv]")
    add("--jobs", type=int, default=1, metavar="N", help="processes, of one thread each where there are several [1]")
    add("--limit", type=float, default=float("inf"), metavar="S", help="begin nothing after so many seconds")
    add("--data", type=Path, help="smollm2: the folder of Random Birthdays")
    add("--model", type=Path, help="smollm2: its directory [OUT/smollm2, from PyPI]")
    add("--hours", type=float, default=10.0, help="smollm2 on a CPU: decides how many people [10]")
    add("--people", type=int, help="smollm2: of each split, in place of --hours")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="smollm2")
    return made


def begun(arguments: argparse.Namespace) -> Evidence:
    """What the arguments ask for; of SmolLM2 as many people as there is time for."""
    night = arguments.world == "smollm2" and arguments.device == "cpu"
    asked = {
        name: usual if getattr(arguments, name) is None else getattr(arguments, name)
        for name, usual in (NIGHT if night else WHOLE).items()
    }
    if SEARCH_SEED in asked["seeds"]:
        raise ValueError(f"--seeds: {SEARCH_SEED} is the seed of the search: leave it out")
    if arguments.world == "demo":
        return Evidence(Place("demo", arguments.out), **asked)
    if arguments.data is None or not (arguments.data / "split_0.jsonl").is_file():
        raise ValueError(f"--data: {arguments.data} has no split_0.jsonl: give the folder of Random Birthdays")
    model = birthdays.fetch(arguments.model or arguments.out / "smollm2")
    options = dict(data=str(arguments.data), model=str(model), device=arguments.device, folds=2 if night else 5)
    people = arguments.people
    if people is None:
        people = birthdays.PEOPLE
        if night:
            one = Evidence(Place("smollm2", arguments.out, (*options.items(), ("people", 8))), **asked)
            people = birthdays.affordable(
                one.seconds(*birthdays.probe(world_of(one.place, SEARCH_SEED))) / 8, arguments.hours
            )
    print(f"{people} people of each split", flush=True)
    return Evidence(Place("smollm2", arguments.out, (*options.items(), ("people", people))), **asked)


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.world == "demo" or arguments.jobs > 1:
        torch.set_num_threads(1)
    runner = Runner(arguments.jobs, arguments.limit)
    try:
        with hold(arguments.out):
            evidence = begun(arguments)
            for phase, units in evidence.phases():
                if not runner.run(phase, units):
                    break
            print(evidence.report(arguments.csv or arguments.out / "evidence.csv"))
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if runner.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
