"""The tables of what was measured, made from the committed rows, and docs/evaluation.md's of the measures.

python tests/readme_tables.py          # writes them into the pages
"""

import csv
import functools
import importlib
import pkgutil
from pathlib import Path

from kunbr_fast.benchmarks.rows import outcomes, read_rows
from kunbr_fast.measures.registry import GROUPS
from kunbr_fast.model.patch import WORTH

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CPU, H200, H200_DENSITY, H100 = (RESULTS / f"{name}.csv" for name in ("cpu", "h200", "h200_density", "h100"))


def cases(suite, path=CPU):
    return [case for case in outcomes(read_rows(path)) if case.suite == suite]


def _ran(case):
    return {row["variant"]: row for row in case.ran}


def _slower(rival, ours):
    """How much slower the rival is than ours."""
    return f"{rival['ms'] / ours['ms']:.2f}x"


def step():
    found = []
    for case in cases("step"):
        ran = _ran(case)
        ours, reference = ran["torch"], ran["reference"]
        block, _, loss = case.case.split(", ")
        memory = [row["peak_mib"] + row["standing_mib"] for row in (ours, reference)]
        rival = min((row for row in case.rivals if row["variant"] != "reference"), key=lambda row: row["ms"])
        found.append(
            [
                block.removeprefix("layers "), loss, f"{reference['ms']:.0f} ms", f"{ours['ms']:.0f} ms",
                f"{ours['speedup']:.2f}x", f"{reference['spent_gflop'] / ours['spent_gflop']:.2f}x",
                f"{memory[0] / memory[1]:.2f}x", f"{rival['variant']}, {_slower(rival, ours)}",
            ]
        )  # fmt: skip
    return found


def density():
    found = []
    for case in cases("density"):
        weight, *rest = case.case.split(", ")
        if weight != "up" or rest[0] == "L2":
            continue
        ran = _ran(case)
        ours, rival = ran["torch"], min(case.rivals, key=lambda row: row["ms"])
        (l2,) = (c for c in cases("density") if c.model == case.model and c.case == case.case.replace("up,", "up, L2,"))
        l2 = _ran(l2)
        found.append(
            [
                f"{case.model} up", rest[-1].removeprefix("T="),
                f"{ours['ms']:.1f}", f"{ours['ms'] / ran['bare']['ms']:.2f}",
                f"{ours['roofline_percent']:.0f} %", f"{rival['variant']}, {_slower(rival, ours)}",
                _slower(ran["loop"], ours), f"{l2['gram']['ms']:.1f}, {l2['opacus']['ms']:.1f}",
            ]
        )  # fmt: skip
    return found


def whole_model():
    """A sentence."""
    (case,) = (case for case in cases("density") if case.case.startswith("whole model"))
    ran = _ran(case)
    floor = ran["plain"]["ms"] + ran["products"]["ms"]
    return (
        "In a whole model (8 layers of SmolLM2's\n"
        f"shapes) density takes {ran['torch']['ms'] / floor:.2f}x the time of a "
        "backward pass without weight gradients plus the bare products, and the\n"
        f"loop {_slower(ran['loop'], ran['torch'])} the time of density."
    )


ELSEWHERE = {  # suite: cases
    "linear_loss": ("head frozen, R=512, V=49152",),
    "norms": ("RMSNorm, frozen, T=512", "SwiGLU, T=512", "rotary, T=512"),
    "cover_layer": ("cover, T=512", "active, T=512"),
    "optimizer": ("Lion, fp32, 2 layers", "AdamW, fp32, 2 layers"),
}


def elsewhere():
    found = []
    for suite, wanted in ELSEWHERE.items():
        for name in wanted:
            (case,) = (case for case in cases(suite) if case.case == name)
            ran = _ran(case)
            ours, eager, rival = ran["torch"], ran["eager"], min(case.rivals, key=lambda row: row["ms"])
            kept = f"{ours['kept_mib'] / eager['kept_mib']:.2f}x" if ours["kept_mib"] and eager["kept_mib"] else "-"
            found.append(
                [
                    f"{suite}: {name}", f"{ours['ms']:.3g} ms", _slower(eager, ours),
                    f"{rival['variant']}, {_slower(rival, ours)}", f"{ours['peak_mib'] / eager['peak_mib']:.2f}x", kept,
                ]
            )  # fmt: skip
    return found


def end_to_end():
    found, blocks = {}, {}
    for case in cases("end_to_end"):
        for row in case.ran:
            where = blocks if case.case.startswith("layers") else found.setdefault(case.case, {})
            where[row["variant"]] = where.get(row["variant"], 0.0) + row["ms"] / 6e4
    total = found.pop("total")
    found = {**{name: found[name] for name in ("warm-up", "density", "prefix cache")}, "re-insertion": blocks,
             **{name: found[name] for name in ("merge", "rest")}, "total": total}  # fmt: skip
    return [
        [stage, *(f"{both[side]:.1f} min" if side in both else "-" for side in ("reference", "torch"))]
        for stage, both in found.items()
    ]


# ---------------------------------------------------------------- on a GPU


def gpu_step(path):
    found = []
    for case in cases("step", path):
        ran = _ran(case)
        block, _, loss = case.case.split(", ")
        sides = ("reference", "frozen eager", "frozen, liger", "torch", "triton", "torch, graph", "triton, graph")
        times = (f"{ran[side]['ms']:.0f}" if side in ran else "-" for side in sides)
        found.append([block.removeprefix("layers "), loss, *times, f"{case.ours['speedup']:.2f}x"])
    return found


def gpu_kernels(path):
    """Every case: the fastest of ours, and how much slower plain torch and the fastest rival are."""
    found = []
    for suite in ("linear_loss", "optimizer", "norms", "cover_layer"):
        for case in cases(suite, path):
            ours, eager, rival = case.ours, _ran(case)["eager"], case.rivals[0]
            found.append(
                [
                    f"{suite}: {case.case}", f"{ours['ms']:.3g}", ours["variant"], f"{ours['roofline_percent']:.0f} %",
                    _slower(eager, ours), f"{rival['variant']}, {_slower(rival, ours)}",
                ]
            )  # fmt: skip
    return found


def gpu_density():
    """TFLOP/s of one weight's grad_l1, and of the bare products, of every case with a number."""
    names = {"bare": "bare", "torch": "torch", "triton": "triton", "portable": "tile csrc portable", "hopper": "cuda"}
    found = []
    for case in cases("density", H100):
        weight, *rest = case.case.split(", ")
        if rest[0] != "L2":
            ran = _ran(case)
            rates = (f"{ran[name]['tflop_per_s']:.0f}" for name in names.values())
            rival = min((ran["loop"], ran["grouped_mm"]), key=lambda row: row["ms"])
            found.append(
                [weight, rest[0].removeprefix("T="), *rates, f"{rival['variant']}, {_slower(rival, case.ours)}"]
            )
    return found


def gpu_density_by_hand():
    """TFLOP/s of one weight's grad_l1, and of the bare products."""
    with open(H200_DENSITY) as file:
        rows = [row for row in csv.DictReader(file) if row["implementation"] != "roofline"]
    found = {}
    for row in rows:
        rate = float(row["tflop_per_s"])
        if row["implementation"] == "bare":
            found.setdefault(row["case"], {})["bare"] = max(rate, found.get(row["case"], {}).get("bare", 0.0))
        elif row["what"] == "all":
            assert row["same"] == "True"
            found.setdefault(row["case"], {})[row["implementation"]] = rate
    sides = ("bare", "torch", "triton", "portable", "hopper")
    return [[case, *(f"{of[side]:.0f}" if side in of else "-" for side in sides)] for case, of in found.items()]


def fused_layers():
    """Fused over own, milliseconds a layer: forward alone, and with the backward pass."""
    with open(RESULTS / "fused_layers_h100.csv") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for row in rows:
        cells = found.setdefault((row["model"], row["tokens"]), [float(row["weights_x_tokens"])])
        cells.append(f"{float(row['own_ms']):.2f}, {float(row['fused_ms']):.2f}, {float(row['ratio']):.2f}x")
    worth = {True: "fused", False: "its own"}
    return [[*key, *times, worth[product >= WORTH]] for key, (product, *times) in found.items()]


def patched_trainers():
    """Of each trainer the last row."""
    with open(RESULTS / "patched_trainers_h200.csv") as file:
        rows = {row["trainer"]: row for row in csv.DictReader(file)}
    return [
        [
            name, f"{float(row['plain_ms']):.0f}", f"{float(row['patched_ms']):.0f}",
            "{:.2f}x ({:.2f} to {:.2f})".format(*(float(row[key]) for key in ("ratio", "ratio_p20", "ratio_p80"))),
            f"{float(row['kept_mib_ratio']):.2f}x", f"{float(row['peak_mib_ratio']):.2f}x",
        ]
        for name, row in rows.items()
    ]  # fmt: skip


def measures(group):
    """Every registered measure of a group."""
    import kunbr_fast.measures

    for module in pkgutil.iter_modules(kunbr_fast.measures.__path__):
        importlib.import_module(f"kunbr_fast.measures.{module.name}")
    from kunbr_fast.measures.registry import MEASURES, READ

    return [
        [
            f"`{of.name}`", of.title, " ".join(of.formula.split()).replace("|", "&#124;"), of.known or "-",
            " ".join((*of.suites, "all")), " ".join(of.sets),
            " ".join(need for need in of.needs if need not in READ) or "-",
        ]
        for of in MEASURES.values() if of.group == group and of.function.__module__.startswith("kunbr_fast.")
    ]  # fmt: skip


def beside_open_unlearning():
    """Figures of examples/open_unlearning_measures.py."""
    with open(RESULTS / "open_unlearning_measures.csv") as file:
        return [
            [
                f"`{row['figure']}`", row["set"], f"{float(row['open_unlearning']):.6f}", f"{float(row['ours']):.6f}",
                f"{float(row['apart']):.0e}", row["made_alike"] or "-",
            ]
            for row in csv.DictReader(file)
        ]  # fmt: skip


def evaluation_times():
    """Of each measure its last row, seconds of a processor."""
    with open(RESULTS / "evaluation_cpu.csv") as file:
        rows = {row["measure"]: row for row in csv.DictReader(file)}
    return [
        [name if " " in name else f"`{name}`", row["records"], row["theirs_s"], row["ours_s"], f"{row['ratio']}x"]
        for name, row in rows.items()
    ]


TABLES = {
    "## One step, against the reference procedure": step,
    "## A whole run": end_to_end,
    "## Density, against its rivals": density,
    "## Elsewhere, on a CPU": elsewhere,
    "### One step, on an H200": functools.partial(gpu_step, H200),
    "### Kernels, on an H200": functools.partial(gpu_kernels, H200),
    "### Density, on an H200": gpu_density_by_hand,
    "### One step, on an H100": functools.partial(gpu_step, H100),
    "### Kernels, on an H100": functools.partial(gpu_kernels, H100),
    "### Density, on an H100": gpu_density,
    "### Fused layers beside a model's own, on an H100": fused_layers,
}


MEASURED = {f"### {group.capitalize()}": functools.partial(measures, group) for group in GROUPS}
PAGES = {
    "results": TABLES,
    "integrations": {"### The time of a step, on an H200": patched_trainers},
    "evaluation": MEASURED
    | {"## Beside OpenUnlearning's own code": beside_open_unlearning}
    | {"## How long it takes": evaluation_times},
}


def with_rows(text, heading, rows):
    """The page with these rows (lists of cells) below the two header lines of the first table of a heading."""
    before, after = text.split(heading + "\n", 1)
    lines = after.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|")) + 2
    last = next((i for i in range(first, len(lines)) if not lines[i].startswith("|")), len(lines))
    lines[first:last] = [f"| {' | '.join(cells)} |" for cells in rows]
    return before + heading + "\n" + "\n".join(lines) + "\n"


def write():
    """Puts the rows into the pages."""
    for name, tables in PAGES.items():
        page = ROOT / "docs" / f"{name}.md"
        text = page.read_text()
        for heading, make in tables.items():
            text = with_rows(text, heading, make())
        page.write_text(text)


if __name__ == "__main__":
    write()
