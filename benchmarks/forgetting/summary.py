"""What the units say together: which setting is chosen, tables, rows of the CSV."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kunbr_fast.benchmarks.forgetting.methods import BASELINE, METHODS, Setting
from kunbr_fast.benchmarks.forgetting.units import REHEARSED, Unit
from kunbr_fast.evaluation.candidates import SAMPLES
from kunbr_fast.files.atomic import atomic_write

RETAIN, BYSTANDERS = 0.95, 0.85  # what a setting must keep, in smooth accuracy
RULE = (
    f"the lowest smooth accuracy under the attack {REHEARSED} among settings that keep {RETAIN:.0%} of the retain set "
    f"and {BYSTANDERS:.0%} of the bystanders (smooth); where none does, the one that lacks least"
)
_SHORT = {"warmup_lr": "lr", "hidden_coeff": "h", "retain_coeff": "retain"}
_SAME = "objective retain_loss insertion max_retain_loss skip_last_layers".split()  # of all settings of a method


# ---------------------------------------------------------------- choosing


def lacking(unit: Unit) -> float:
    """How much the result has lost beyond what it may; infinite where the training diverged."""
    accuracy = (unit.trained or {}).get("accuracy")
    if accuracy is None:
        return math.inf
    limits = {"retain": RETAIN, "bystanders": BYSTANDERS}
    return sum(max(0.0, limit - accuracy[group]["smooth"]) for group, limit in limits.items())


def candidates(units: Sequence[Unit]) -> list[Unit]:
    """The settings of a method that are worth an attack by the rule."""
    least = min(map(lacking, units))
    return [unit for unit in units if lacking(unit) == least < math.inf]


def chosen(units: Sequence[Unit]) -> Unit | None:
    """By `RULE`; of equal ones the first. None where every training diverged."""
    attacked = [(unit, unit.result(REHEARSED)) for unit in candidates(units)]
    scored = [(result.smooth_accuracy, unit) for unit, result in attacked if result is not None]
    return min(scored, key=lambda found: found[0])[1] if scored else None


# ---------------------------------------------------------------- figures


def damage(unit: Unit, group: str, key: str = "smooth") -> float:
    return 100 * unit.trained["accuracy"][group][key]


def strength(unit: Unit, kinds: Iterable[str], key: str = "smooth") -> tuple[float, str] | None:
    """The strongest of these kinds of attack, in percent; None where one is not finished."""
    name = {"smooth": "smooth_accuracy", "plain": "accuracy"}[key]
    found = []
    for kind in kinds:
        if (result := unit.result(kind)) is None:
            return None
        found.append((100 * getattr(result, name), kind))
    return max(found)


def spread(values: Sequence[float]) -> str:
    """Mean and standard error over seeds."""
    mean = statistics.mean(values)
    return f"{mean:.1f}" if len(values) < 2 else f"{mean:.1f} ± {statistics.stdev(values) / len(values) ** 0.5:.1f}"


def said(setting: Setting) -> str:
    """A setting in a few words."""
    words = []
    for name, value in setting.items():
        if name in _SAME or (name.startswith("adversary") and name != "adversary_reach"):
            continue
        if name in ("top_k", "warmup_epochs") and setting.get("top_k") == 0:
            continue
        if name == "forget_loss_cap" and value is None:
            continue
        if name == "objective_options":
            words += [f"{option} {number:g}" for option, number in value.items()]
        elif name == "adversary_reach":
            words.append(f"adversary of the {value}")
        elif name in ("warmup_optimizer", "optimizer"):
            words.append({"lion": "Lion", "adamw": "AdamW"}[value])
        elif isinstance(value, tuple):
            words.append(f"{name.replace('_', ' ')} {', '.join(f'{entry:g}' for entry in value)}")
        elif isinstance(value, (bool, str)):
            words.append(f"{name.replace('_', ' ')} {value}" if value not in (True,) else name.replace("_", " "))
        else:
            words.append(f"{_SHORT.get(name, name.replace('_', ' '))} {value:g}")
    return ", ".join(words)


def both(plain: Sequence[float], smooth: Sequence[float]) -> str:
    return f"{statistics.mean(plain):.1f} / {spread(smooth)}"


# ---------------------------------------------------------------- tables


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *rows])


def main_table(units: Mapping[str, Sequence[Unit]], wide: Sequence[str]) -> str:
    """A line a method, plain / smooth ± its standard error, over the seeds that are finished. The strongest attack is
    of those seeds (their number, where it is another) that met every kind. Differences are paired by seed."""
    header = ["method", "seeds", "forget", "retain", "bystanders", f"attack {REHEARSED}", "against gradient difference",
              "strongest attack", "which", "against gradient difference"]  # fmt: skip
    rows = []
    for method, found in units.items():
        done = [unit for unit in found if strength(unit, [REHEARSED])]
        if not done:
            continue
        cells = [
            both(*([damage(u, group, key) for u in done] for key in ("plain", "smooth")))
            for group in ("forget", "retain", "bystanders")
        ]
        baseline = units.get(BASELINE, ())
        cells += [attacked(done, [REHEARSED]), paired(done, baseline, [REHEARSED])]
        whole = [u for u in done if METHODS[method].wide and strength(u, wide)]
        if whole and len(wide) > 1:
            seeds = f" ({len(whole)})" if len(whole) < len(done) else ""
            which = ", ".join(dict.fromkeys(strength(u, wide)[1] for u in whole))
            cells += [attacked(whole, wide) + seeds, which, paired(whole, baseline, wide)]
        else:
            cells += ["-", "-", "-"]
        rows.append([METHODS[method].title, f"{len(done)}", *cells])
    return markdown(header, rows)


def attacked(units: Sequence[Unit], kinds: Sequence[str]) -> str:
    return both(*([strength(unit, kinds, key)[0] for unit in units] for key in ("plain", "smooth")))


def paired(units: Sequence[Unit], baseline: Sequence[Unit], kinds: Sequence[str]) -> str:
    """The mean difference in smooth accuracy under the strongest of `kinds`, seed by seed."""
    other = {unit.seed: found for unit in baseline if (found := strength(unit, kinds))}
    differences = [strength(u, kinds)[0] - other[u.seed][0] for u in units if u.seed in other]
    if units[0].method == BASELINE or not differences:
        return "-"
    text = spread(differences)
    return text if text.startswith("-") else f"+{text}"


def attack_table(units: Mapping[str, Sequence[Unit]], kinds: Sequence[str]) -> str:
    """Smooth accuracy under each kind over the seeds that met it, and what 64 sampled answers tell before and after the
    rehearsed one."""
    header = ["method", *kinds, f"leak at {SAMPLES[-1]}, before", "after"]
    rows = []
    for method, found in units.items():
        done = [unit for unit in found if METHODS[method].wide and strength(unit, [REHEARSED])]
        if done:
            each = [[met[0] for u in done if (met := strength(u, [kind]))] for kind in kinds]
            leaks = [[100 * u.result(REHEARSED).leaks(attack)[-1] for u in done] for attack in (None, REHEARSED)]
            rows.append([METHODS[method].title, *(spread(values) if values else "-" for values in (*each, *leaks))])
    return markdown(header, rows)


def search_table(search: Mapping[str, Sequence[Unit]]) -> str:
    header = ["method", "setting", "forget", "retain", "bystanders", f"attack {REHEARSED}", ""]
    rows = []
    for method, units in search.items():
        picked = chosen(units)
        for unit in units:
            if unit.trained is None:
                continue
            if "diverged" in unit.trained:
                cells = ["diverged", "", "", "", ""]
            else:
                attack = strength(unit, [REHEARSED])
                mark = "" if unit is not picked else "chosen" if not lacking(unit) else "chosen, though it lacks"
                cells = [f"{damage(unit, group):.1f}" for group in ("forget", "retain", "bystanders")]
                cells += [f"{attack[0]:.1f}" if attack else "-", mark]
            rows.append([METHODS[method].title, said(unit.setting), *cells])
    return markdown(header, rows)


# ---------------------------------------------------------------- CSV


def csv_rows(
    phase: str, units: Iterable[Unit], picked: set[tuple[str, int]], kinds: Sequence[str]
) -> list[dict[str, Any]]:
    """A row for each unit and each of these kinds of attack (one without an attack where there was none)."""
    rows = []
    for unit in units:
        if (trained := unit.trained) is None:
            continue
        row: dict[str, Any] = {
            "benchmark": "evidence", "world": unit.place.world, "phase": phase, "method": unit.method,
            "setting": said(unit.setting), "chosen": (unit.method, unit.number) in picked, "seed": unit.seed,
            "diverged": "diverged" in trained,
        }  # fmt: skip
        for group in ("forget", "retain", "bystanders"):
            for key in ("plain", "smooth"):
                value = None if row["diverged"] else damage(unit, group, key)
                row[f"{group}_{key}"] = value if value is None else round(value, 2)
        row |= {name: trained.get(name) and round(trained[name], 1) for name in ("seconds", "cpu_seconds")}
        found = [(kind, result) for kind in kinds if (result := unit.result(kind)) is not None]
        for kind, result in found or [(None, None)]:
            rows.append({**row, **_attack_cells(kind, result), **trained["about"]})
    return rows


def _attack_cells(kind: str | None, result: Any) -> dict[str, Any]:
    names = "attack lr epoch plain plain_error smooth smooth_error leak_64".split()
    if result is None:
        return dict.fromkeys(names)
    found = result.summary(kind)
    keys = ("accuracy", "standard_error", "smooth_accuracy", "smooth_error")
    numbers = [None if found[key] is None else round(100 * found[key], 2) for key in keys]
    leak = None if found["leak"] is None else round(100 * found["leak"][-1], 2)
    return dict(zip(names, [kind, found["lr"], found["epoch"], *numbers, leak], strict=True))


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())
