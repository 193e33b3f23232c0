"""What a Trainer says of its result, by the report of the run."""

from __future__ import annotations

from kunbr_fast.evaluation.report import Report


def figures(report: Report | None) -> dict[str, float]:
    """A report's figures as every logger takes them: numbers by name, of what was measured. None: none."""
    if report is None:
        return {}
    found: dict[str, float] = {}
    for model, prefix in (("original", "original_"), ("unlearned", "unlearned_"), ("result", "")):
        row = report.row(model=model)
        for name in ("forget", "retain", "rtt"):
            if name in row:
                found[f"{prefix}{name}_{row['metrics'].get(name, 'accuracy')}"] = row[name]
    found["recovery"] = report.recovery
    return {name: value for name, value in found.items() if value is not None}
