"""What a run says at the end: its report, a table for the terminal and a report.json."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kunbr_fast.density.measure import Density
from kunbr_fast.evaluation import cautions
from kunbr_fast.evaluation.candidates import SAMPLES
from kunbr_fast.evaluation.curves import RTTResult, Strongest
from kunbr_fast.files import atomic
from kunbr_fast.files.shown import plain
from kunbr_fast.version import __version__


@dataclasses.dataclass
class Report:
    """What a run did. Accuracies are fractions; seconds are wall time by stage.

    accuracy: {"original" | "unlearned" | "result": {"forget": {...}, "retain": {...}}}, where `unlearned` is the
    model after the warm-up (M_u); empty where no questions were given. probability: likewise, the probability of the
    answer (`evaluation.probability`) of sets without questions. losses: mean losses of each epoch by stage.
    examples: a few questions of the forget set, with the choice that each model takes (`evaluation.examples`).
    gradient_cosines, cache_errors: of a cover and of a prefix cache in low precision, by stage
    (`training.approximation`).
    """

    config: dict[str, Any]
    blocks: list[range]
    density: Density
    seconds: dict[str, float]
    losses: dict[str, list[dict[str, float]]]
    accuracy: dict[str, dict[str, dict[str, Any]]] = dataclasses.field(default_factory=dict)
    rtt: RTTResult | None = None
    gradient_cosines: dict[str, float] = dataclasses.field(default_factory=dict)
    cache_errors: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    version: str = __version__
    probability: dict[str, dict[str, dict[str, Any]]] = dataclasses.field(default_factory=dict)
    examples: list[dict[str, str | None]] = dataclasses.field(default_factory=list)

    @property
    def recovery(self) -> float | None:
        """RTT accuracy minus the accuracy before the attack, of the folds' questions (`RTTResult.recovery`); of folds
        without questions answer probability."""
        return None if self.rtt is None else self.rtt.recovery

    @property
    def cautions(self) -> list[str]:
        """What the figures cannot show (`evaluation.cautions`); none where all is well."""
        return cautions.of_run(self.accuracy, self.probability, self.rtt)

    @property
    def method(self) -> str:
        """What made the result, for people."""
        return method_of(self.config, self.blocks)

    def row(self, method: str | None = None, model: str = "result") -> dict[str, Any]:
        """One line of `table`; method: its name (default: the report's)."""
        method = method or self.method
        of = {what: each["plain"] for what, each in self.accuracy.get(model, {}).items()}
        probable = {what: each["mean"] for what, each in self.probability.get(model, {}).items()}
        metrics = dict.fromkeys(probable, "probability")
        if model != "result":
            return {"method": method, **of, **probable, "metrics": metrics}
        attacked: dict[str, Any] = {"rtt": None, "recovery": None}
        if self.rtt is not None:
            attacked, metrics["rtt"] = {"rtt": self.rtt.accuracy, "recovery": self.recovery}, self.rtt.metric
        return {"method": method, **of, **probable, **attacked, "seconds": self.seconds, "metrics": metrics}

    @property
    def figures(self) -> dict[str, float]:
        """Numbers by name, as loggers take them, of what was measured: forget_accuracy (or forget_probability),
        retain_accuracy, rtt_accuracy, recovery; original_forget_accuracy, unlearned_forget_accuracy, ..."""
        found: dict[str, float | None] = {}
        for model, prefix in (("original", "original_"), ("unlearned", "unlearned_"), ("result", "")):
            row = self.row(model=model)
            for name in _MEASURED:
                found[f"{prefix}{name}_{row['metrics'].get(name, 'accuracy')}"] = row.get(name)
        found["recovery"] = self.recovery
        return {name: value for name, value in found.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        return {
            "kunbr_fast": self.version,
            "config": self.config,
            "blocks": [[block.start, block.stop] for block in self.blocks],
            "density": self.density.to_dict(),
            "seconds": self.seconds,
            "losses": self.losses,
            "accuracy": self.accuracy,
            **({"probability": self.probability} if self.probability else {}),
            "rtt": None if self.rtt is None else self.rtt.to_dict(),
            **({"gradient_cosines": self.gradient_cosines} if self.gradient_cosines else {}),
            **({"cache_errors": self.cache_errors} if self.cache_errors else {}),
            "recovery": self.recovery,
            "cautions": self.cautions,
            **({"examples": self.examples} if self.examples else {}),
        }


def method_of(config: Mapping[str, Any], blocks: Sequence) -> str:
    """What made the result of a run with these settings and chosen blocks, for people."""
    objective = config.get("warmup_objective") or config["objective"]
    name = "KUnBR" if blocks else objective.replace("_", " ")
    return name + ", adversary" * bool(config["adversary_every"])


def table(rows: Sequence[Mapping]) -> str:
    """Methods side by side, as a Markdown table.

    rows: {"method": str, "forget": accuracy, "retain": accuracy, "rtt": accuracy, "recovery": difference, "other":
    {name: accuracy}, "seconds": {stage: seconds}}, each accuracy 0..1. What a method does not have may be missing or
    None and is shown as "-". Recovery is in points, without one given rtt - forget. "metrics": {"forget" | "retain" |
    "rtt": "probability"} of what is an answer probability; a column is of one metric (ValueError).
    """
    if not rows:
        raise ValueError("no methods to show: the row list is empty")
    stages = list(dict.fromkeys(stage for row in rows for stage in row.get("seconds") or {}))
    others = list(dict.fromkeys(name for row in rows for name in row.get("other") or {}))
    forget, retain, rtt = (f"{title}{_metric(rows, name)}" for name, title in _MEASURED.items())
    header = ["method", forget, retain, *others, rtt, "recovery", *[f"{stage} (s)" for stage in stages]]
    return markdown(header, [_cells(row, others, stages) for row in rows])


_MEASURED = {"forget": "forget", "retain": "retain", "rtt": "RTT"}


def _metric(rows: Sequence[Mapping], name: str) -> str:
    """What a column's title says of its metric."""
    found = {(row.get("metrics") or {}).get(name, "accuracy") for row in rows if row.get(name) is not None}
    if len(found) > 1:
        raise ValueError(f"the column {name} has {' and '.join(sorted(found))}: expected one metric, make two tables")
    return " (probability)" if found == {"probability"} else ""


def attack_table(result: RTTResult) -> str:
    """The attacks side by side, as a Markdown table: each one's strongest point, with standard errors over questions.
    Leak at k: the share of questions whose answer is among k sampled ones, at the attack's end; it is not comparable
    with the accuracies. What the scoring does not measure has no column."""
    kinds = ["calibrated"] * (result.calibrated_accuracy is not None)
    kinds += ["smooth"] * (result.smooth_accuracy is not None)
    leaks = {"before": result.leaks(), "guessing": result.guesses}
    leaks |= {attack: result.leaks(attack) for attack in result.attacks}
    rtt = "RTT (probability)" if result.metric == "probability" else "RTT"
    at = [0, len(SAMPLES) - 1] if leaks["before"] is not None else []
    header = ["attack", "learning rate", "epoch", rtt, *kinds, *[f"leak at {SAMPLES[k]}" for k in at]]

    def leak(name: str) -> list[str]:
        return [_percent(leaks[name] and leaks[name][k]) for k in at]

    rows = []
    for attack in result.attacks:
        found = result.summary(attack)
        values = [_with_error(found["accuracy"], found["standard_error"])]
        values += [_percent(found["calibrated_accuracy"])] * ("calibrated" in kinds)
        values += [_with_error(found["smooth_accuracy"], found["smooth_error"])] * ("smooth" in kinds)
        trained = [f"{found['lr']:g}", f"{found['epoch']}"] if found["lr"] else ["-", "-"]
        rows.append([attack, *trained, *values, *leak(attack)])
    failed = dict.fromkeys((found["attack"], found["lr"]) for found in result.diverged)
    for attack, lr in failed:
        rows.append([attack, f"{lr:g}", "diverged", "-", *["-"] * (len(kinds) + len(at))])
    first = Strongest(result.attacks[0], result.lrs[0], 0)
    before = {key: result.curve(first.lr, key, first.attack) for key in ("plain", *kinds)}
    errors = {key: result.error(first, key) for key in ("plain", "smooth") if key in before}
    values = [_with_error(curve and curve[0], errors.get(key)) for key, curve in before.items()]
    rows.insert(0, ["before", "-", "-", *values, *leak("before")])
    if leaks["guessing"] is not None and at:
        rows.insert(1, ["guessing", "-", "-", "-", *["-"] * len(kinds), *leak("guessing")])
    return markdown(header, rows)


def attacks_table(results: Mapping[str, RTTResult]) -> str:
    """Methods under each kind of attack, as a Markdown table: the strongest point's plain accuracy, and the smooth
    accuracy of the strongest of all. A kind that a method was not put under is "-"."""
    kinds = list(dict.fromkeys(attack for result in results.values() for attack in result.attacks))
    if len({result.metric for result in results.values()}) > 1:
        raise ValueError("some results are accuracies and some answer probabilities: make a table of each")
    smooth = ["strongest, smooth"] if all(r.smooth_accuracy is not None for r in results.values()) else []
    rows = []
    for method, result in results.items():
        found = [_percent(result.summary(k)["accuracy"] if k in result.attacks else None) for k in kinds]
        rows.append([plain(method, 60), *found, *[_percent(result.smooth_accuracy) for _ in smooth]])
    return markdown(["method", *kinds, *smooth], rows)


def _with_error(value: float | None, error: float | None) -> str:
    return _percent(value) if value is None or error is None else f"{100 * value:.1f} ± {100 * error:.1f} %"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    rule = ["-" * widths[0], *["-" * (width - 1) + ":" for width in widths[1:]]]
    return "\n".join(
        "| "
        + " | ".join([line[0].ljust(widths[0]), *[c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]])
        + " |"
        for line in [header, rule, *rows]
    )


def write_report(path: str | Path, report: Mapping) -> None:
    """Writes the report as JSON, whole or not at all.

    Besides what JSON knows it takes tensors, paths, ranges and objects with to_dict. ValueError for a number that is
    not finite, TypeError for anything else that JSON lacks; both name its place in the report.
    """
    atomic.write_json(path, plain_values(report, "report"))


def _cells(row: Mapping, others: list[str], stages: list[str]) -> list[str]:
    forget, rtt = row.get("forget"), row.get("rtt")
    recovery = row.get("recovery")
    if recovery is None and None not in (forget, rtt):
        recovery = rtt - forget
    seconds = row.get("seconds") or {}
    return [
        plain(row["method"], 60),
        *[_percent(row.get(key)) for key in ("forget", "retain")],
        *[_percent((row.get("other") or {}).get(name)) for name in others],
        _percent(rtt),
        "-" if recovery is None else f"{100 * recovery:+.1f}",
        *["-" if seconds.get(stage) is None else f"{seconds[stage]:.1f}" for stage in stages],
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def plain_values(value: Any, where: str = "report") -> Any:
    """As JSON has it; the errors of `write_report`."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}, which JSON has no number for; leave it out or write None")
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain_values(entry, f"{where}.{key}") for key, entry in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [plain_values(entry, f"{where}[{i}]") for i, entry in enumerate(value)]
    raise TypeError(f"{where} is a {type(value).__name__}; expected a JSON value, a tensor, a path or a to_dict object")
