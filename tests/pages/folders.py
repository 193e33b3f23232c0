"""Folders as `kunbr-fast unlearn` and `evaluate` leave them, with figures of no model: what pages are made of."""

from pathlib import Path

import torch

from kunbr_fast.density.measure import Density
from kunbr_fast.evaluation.curves import RTTResult
from kunbr_fast.evaluation.report import Report, plain_values
from kunbr_fast.files.atomic import write_json
from kunbr_fast.files.checksums import write_sealed
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.identity import report_digest

LAYERS = 8
NAMES = ("result", "original", "retrained")


def density(layers=LAYERS):
    values = [100.0 / (layer + 1) for layer in range(layers)]
    return Density(torch.tensor(values, dtype=torch.float64), {}, torch.tensor([7] * layers), 12)


def curves(metric="accuracy", attacks=("full", "lora", "int8")):
    """Two folds of 40; `full` at two rates."""
    rows = []
    for attack in attacks:
        for lr in {"full": (1e-5, 5e-5), "int8": (0.0,)}.get(attack, (1e-4,)):
            for number, fold in enumerate(("f0", "f1")):
                for epoch in range(2 if attack == "int8" else 4):
                    right = 10 + number + 3 * epoch + (2 if lr == 5e-5 else 0)
                    row = {"attack": attack, "fold": fold, "lr": lr, "epoch": epoch, "plain": right / 40}
                    row |= {"calibrated": None, "num_questions": 40}
                    if metric == "probability":
                        row |= {"metric": "probability", "error": 0.02, "change_error": 0.01}
                    rows.append(row)
    return RTTResult(rows)


def of_questions(plain, number=80, **more):
    return {"plain": plain, "calibrated": None, "num_questions": number, "chance": 0.25, **more}


def of_records(mean, number=80, **more):
    return {"mean": mean, "standard_error": 0.011, "num_records": number, **more}


def report(metric="accuracy", rtt=True, **settings):
    config = KUnBRConfig(**{"top_k": 2, "num_blocks": 4, **settings})
    kind = of_questions if metric == "accuracy" else of_records
    values = {
        "original": {"forget": kind(0.95), "retain": kind(1.0, 120)},
        "unlearned": {"forget": kind(0.6, change_error=0.05), "retain": kind(0.97, 120, change_error=0.01)},
        "result": {"forget": kind(0.275, change_error=0.052), "retain": kind(0.95, 120, change_error=0.02)},
    }
    losses = {"warmup": [{"forget_loss": 0.5, "retain_loss": 0.1}, {"forget_loss": 2.5, "retain_loss": 0.2}]}
    losses["blocks.0.0-2"] = [{"forget_loss": 3.5, "retain_loss": 0.3}]
    return Report(
        config=config.to_dict(), blocks=[range(0, 2), range(2, 4)], density=density(), losses=losses, version="0.0.0",
        seconds={"evaluation": 1.5, "warmup": 20.25, "density": 3.0, "blocks": 10.0, "rtt": 40.0},
        accuracy=values if metric == "accuracy" else {}, probability=values if metric == "probability" else {},
        rtt=curves(metric) if rtt else None,
    )  # fmt: skip


def examples(texts=("When was Ada born?", "1907", "1907", "1950", "1907")):
    names = ("question", "answer", "original", "result", "attacked")
    return [dict(zip(names, texts))]


def run(folder, made=None, model="models/original", sealed=True, **more):
    """report.json and run.yaml of a finished run. more: other keys of report.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = made or report()
    values = plain_values(made.to_dict() | {"model": model} | more)
    if sealed:
        identity = "-".join(("float32", "a" * 32, "b" * 32, "c" * 64))
        files = {"model.safetensors": {"size": 12, "xxh3": "d" * 32}}
        values["result"] = {"identity": identity, "unlearned": None, "files": files, "report": report_digest(values)}
    write_json(folder / "report.json", values)
    KUnBRConfig.from_dict(made.config, of_a_run=True).save(folder / "run.yaml")
    return folder


def row(measure, group, what, model, value, **more):
    found = {"measure": measure, "title": measure.replace("_", " "), "group": group, "set": what, "model": model}
    found |= {"value": value, "standard_error": 0.01, "number": 80, "unit": "share", "known": "higher", "detail": {}}
    return found | more


def figures():
    found = []
    for model, known in (("original", 0.9), ("result", 0.3), ("retrained", 0.28)):
        found += [
            row("rouge_l_recall", "knowledge", w, model, known if w == "forget" else 0.88) for w in ("forget", "retain")
        ]
        found.append(row("extraction_strength", "memorisation", "forget", model, known / 2))
        found.append(
            row("perplexity", "utility", "holdout", model, 12.3456, unit="", known="lower", standard_error=None)
        )
        layers = {"layers": list(range(LAYERS)), "values": [known * layer / LAYERS for layer in range(LAYERS)]}
        found.append(row("linear_probe", "depth", "forget", model, known, detail=layers))
    return found


def evaluation(folder, **more):
    """A sealed evaluation.json. more: keys in place of its own."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    of_set = {"records": 80, "files": ["f.jsonl"], "forms": {"tofu": 80}, "fingerprint": "e" * 32}
    value = {
        "kunbr_fast": "0.0.0", "format": 1, "suite": "all", "settings": {"batch_tokens": 4096},
        "models": {name: {"path": f"models/{name}", "fingerprint": "f" * 32} for name in NAMES},
        "sets": {"forget": of_set, "retain": of_set, "holdout": of_set},
        "figures": figures(),
        "missing": [{"measure": "min_k", "why": "the holdout set has no text lines"}],
        "examples": [{"set": "forget", "question": "Who?", "answer": "She", "original": "She", "result": ""}],
        "lm_eval": {"mmlu": {"metric": "acc", "original": {"value": 0.41, "standard_error": 0.004},
                             "result": {"value": 0.4, "standard_error": 0.004}}},
        "seconds": {"result: likelihoods": 1.25},
    } | more  # fmt: skip
    write_sealed(folder / "evaluation.json", value)
    return folder


def log(folder, steps=12):
    """logs/log.csv of two stages."""
    from kunbr_fast.run.log import COLUMNS

    lines = [",".join(COLUMNS)]
    for step in range(1, steps + 1):
        cells = {"step": step, "stage": "warmup" if step <= steps // 2 else "blocks.0.0-2", "time": 1000 + step}
        cells |= {"loss": 1.0, "forget_loss": step / 4, "retain_loss": 0.1}
        lines.append(",".join(str(cells.get(name, "")) for name in COLUMNS))
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "logs" / "log.csv").write_text("\n".join(lines) + "\n")
    return folder


def whole(folder):
    """All that a page can show."""
    run(folder, examples=examples())
    evaluation(folder)
    certificate = {"format": 1, "result": {"sha256": "9" * 64}, "forget": {"salted": "8" * 64}}
    write_sealed(folder / "unlearning.json", certificate)
    return log(folder)
