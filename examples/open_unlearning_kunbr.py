"""trainer=KUnBR in OpenUnlearning's own code, on the tiny model of examples/open_unlearning.py. No network, no GPU.

    python examples/open_unlearning_kunbr.py --checkout open-unlearning --out runs/open_unlearning

What it looks at: that a run says what this machine lacks; a retain model's logs, by `eval`; that the final figures,
forget quality and privleak among them, are those of the saved model, which `eval` and do_train=false measure again,
though earlier evaluations were kept (overwrite=false); lm_eval; WMDP's max_steps; the RTT attack. Each line is a run
or two. Exit status 1 where something is not as it should be.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from open_unlearning import NAMES, NO_EVALUATION, fact, file_of, model_of, overrides, run, workspace

KUNBR = [
    f"trainer.method_args.config.{setting}"
    for setting in ("num_blocks=4", "top_k=2", "warmup_epochs=1", "block_epochs=1", "block_lr=1e-3", "warmup_lr=1e-4")
]
METRICS = ("forget_Q_A_Prob", "forget_Q_A_ROUGE", "forget_quality", "privleak")


def metrics(work: Path, retain_logs: Path | None = None) -> list[str]:
    """OpenUnlearning's evaluation with our files."""
    metric, forget = "eval.tofu.metrics", work / "forget.json"
    ratio = f"{metric}.forget_quality.pre_compute.forget_truth_ratio.pre_compute"
    attack = f"{metric}.privleak.pre_compute.mia_min_k.datasets"
    return [
        f"eval/tofu_metrics@eval.tofu.tofu_metrics=[{','.join(METRICS)}]",
        f"{metric}.forget_Q_A_ROUGE.generation_args.max_new_tokens=8",
        f"eval.tofu.retain_logs_path={retain_logs or 'null'}",
        *file_of(f"{metric}.forget_Q_A_Prob.datasets.TOFU_QA_forget", forget),
        *file_of(f"{metric}.forget_Q_A_ROUGE.datasets.TOFU_QA_forget", forget),
        *file_of(f"{ratio}.forget_Q_A_PARA_Prob.datasets.TOFU_QA_forget_para", forget),
        *file_of(f"{ratio}.forget_Q_A_PERT_Prob.datasets.TOFU_QA_forget_pert", forget),
        *file_of(f"{attack}.TOFU_QA_forget", forget),
        *file_of(f"{attack}.TOFU_QA_holdout", work / "holdout.json"),
    ]


def questions(path: Path, names: list[str]) -> Path:
    """A file of questions with choices."""
    lines = []
    for number, name in enumerate(names):
        choices = [str(1900 + 7 * number + other) for other in (0, 3, 5, 8)]
        lines.append({"question": fact(name, 0)["question"], "choices": choices, "answer": 0})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


class Checks:
    """Each a run or two of the launcher; says what was found, or ends the script."""

    def __init__(self, checkout: Path, out: Path):
        self.checkout, self.out, self.work = checkout, out, out / "work"
        self.retain_logs, self.result = out / "retain_logs" / "TOFU_EVAL.json", out / "result"
        workspace(self.work)

    def run(self, name: str, *arguments: str, script: tuple[str, ...] = (), refused: bool = False) -> str:
        return run(self.checkout, [*script, *arguments], self.out / "logs" / f"{name}.log", refused)

    def train(self, name: str, *arguments: str, trainer: str = "KUnBR", **kwargs) -> str:
        ours = KUNBR if trainer == "KUnBR" else []
        given = [f"trainer={trainer}", *overrides(self.work, self.out / name), *ours, *arguments]
        return self.run(name, "--config-name=unlearn.yaml", *given, **kwargs)

    def evaluate(self, name: str, model: Path, *arguments: str) -> dict:
        """Its summary, by src/eval.py."""
        given = [
            *model_of(model),
            "model.model_args.device_map=null",
            "task_name=tiny",
            f"paths.output_dir={self.out / name}",
        ]
        self.run(name, "--config-name=eval.yaml", *given, *metrics(self.work, *arguments), script=("eval",))
        return summary(self.out / name)

    def machine(self) -> str:
        """The stock arguments without a GPU; and with what they are said to need, without the hub."""
        stock = ["experiment=unlearn/tofu/default", "trainer=NPO", "task_name=tiny"]
        said = self.run("machine", "--config-name=unlearn.yaml", *stock, refused=True).splitlines()[-1]
        cures = said.partition("add ")[2].split()
        check("there is no GPU here" in said and len(cures) == 3, said)
        said = self.run("hub", "--config-name=unlearn.yaml", *stock, *cures, refused=True).splitlines()[-1]
        check("could not be loaded" in said and "=FOLDER" in said, said)
        return " ".join(cures)

    def rate(self) -> str:
        """Its warm-up of the rate is told in epochs, by the number of GPUs."""
        self.train("rate", *NO_EVALUATION, "+trainer.args.warmup_epochs=1.0", trainer="GradDiff")
        rates = [row["learning_rate"] for row in state(self.out / "rate") if "learning_rate" in row]
        check(rates[0] == 0.0 and max(rates) == 0.03, rates)
        return f"learning rates {rates}"

    def retain_model(self) -> str:
        """A model that is trained on the retain set alone, and its logs."""
        out = self.out / "retain"
        given = [item for item in overrides(self.work, out) if "data.forget" not in item and "data.retain" not in item]
        given += file_of("data.train.TOFU_QA_full", self.work / "retain.json")
        self.run("retain", "--config-name=train.yaml", "trainer=finetune", *given, *NO_EVALUATION)
        found = self.evaluate("retain_logs", out)
        logs = json.loads(self.retain_logs.read_text())
        check({"mia_min_k", "forget_truth_ratio"} <= set(logs) and "forget_quality" not in found, sorted(logs))
        return f"{self.retain_logs.name} with {', '.join(sorted(logs))}"

    def final_figures(self) -> str:
        """overwrite=false, an evaluation each epoch: those after training are of the result."""
        given = [*metrics(self.work, self.retain_logs), "trainer.args.eval_strategy=epoch"]
        said = self.train("result", *given)
        final, last = evaluated(self.result)
        stages = sorted(path.name for path in self.result.glob("checkpoint-*/evals_stage_*"))
        check(set(final) == set(METRICS) and all(value is not None for value in final.values()), final)
        check(stages == ["evals_stage_0", "evals_stage_1", "evals_stage_2"], stages)
        check(summary(last.parent / stages[-1]) != final and "is of the unlearned model" in said, final)
        check(self.evaluate("again", self.result, self.retain_logs) == final, "eval of the saved model differs")
        return f"{figures(final)}; before the merge: {figures(summary(last.parent / stages[-1]))}"

    def evaluation_alone(self) -> str:
        """do_train=false, of the saved result, into the folder of a run that began with another model."""
        given = ["trainer.args.do_train=false", *metrics(self.work, self.retain_logs), *model_of(self.result)]
        said = self.train("result", *given, f"paths.output_dir={self.result}")
        check(summary(self.result / "checkpoint-0" / "evals") == evaluated(self.result)[0], said[-500:])
        check("not of these weights: removed" in said, "the original's figures were there")
        return "as the final figures"

    def harness(self) -> str:
        """lm_eval, which keeps what it has measured too; a task of our own, as there is no network."""
        task = {
            "task": "years", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(questions(self.work / "asked.json", NAMES[:8]))}},
            "doc_to_text": "{{question}}", "doc_to_choice": "choices", "doc_to_target": "answer",
        }  # fmt: skip
        self.train(
            "harness", "eval=lm_eval", f"eval.lm_eval.tasks=[{inline(task)}]", "trainer.args.eval_strategy=epoch"
        )
        found = sorted(path.parent.name for path in self.out.glob("harness/*/*/LMEval_SUMMARY.json"))
        check(found == ["evals", "evals", "evals_stage_0", "evals_stage_1", "evals_stage_2"], found)
        return ", ".join(found)

    def max_steps(self) -> str:
        """WMDP's: fewer steps than the stages have, evaluations by the share of steps."""
        steps = ["trainer.args.eval_strategy=steps", "+trainer.args.eval_steps=0.5", "+trainer.args.max_steps=4"]
        self.train("max_steps", *metrics(self.work), *steps, "+trainer.args.lr_scheduler_type=constant")
        rows = state(self.out / "max_steps")
        check({row.get("stage") for row in rows if "loss" in row} == {0, 1, 2}, rows)
        return f"stages {[row['stage'] for row in rows if 'loss' in row]}"

    def attack(self) -> str:
        """rtt=true without folds is refused; with them there is a report."""
        rtt = ["+trainer.method_args.config.rtt=true", *NO_EVALUATION]
        said = self.train("no_folds", *rtt, refused=True).splitlines()[-1]
        check("without folds" in said, said)
        folds = [questions(self.work / f"fold_{i}.jsonl", NAMES[4 * i : 4 * i + 4]) for i in range(2)]
        rtt.append(f"trainer.method_args.folds=[{','.join(map(str, folds))}]")
        config = "trainer.method_args.config"
        rtt += [f"+{config}.{setting}" for setting in ("scoring=choice", "rtt_epochs=1", "rtt_lrs=[1e-3]")]
        self.train("rtt", *rtt, f"+{config}.statistic=slug")
        report = json.loads((self.out / "rtt" / "report.json").read_text())
        logged = [row for row in state(self.out / "rtt") if "recovery" in row]
        check(logged and logged[-1]["recovery"] == report["recovery"], report["recovery"])
        check(report["config"]["statistic"] == "slug", report["config"])
        return f"recovery {report['recovery']:.3f}, RTT accuracy {logged[-1]['rtt_accuracy']:.3f}"


def inline(value: dict) -> str:
    """A mapping in Hydra's words for the command line."""
    entries = [f"{k}:{inline(v) if isinstance(v, dict) else json.dumps(v)}" for k, v in value.items()]
    return "{" + ",".join(entries) + "}"


def summary(folder: Path) -> dict:
    return json.loads((folder / "TOFU_SUMMARY.json").read_text())


def evaluated(out: Path) -> tuple[dict, Path]:
    """The last evaluation's summary, and its folder."""
    folder = max(out.glob("checkpoint-*/evals"), key=lambda path: int(path.parent.name.split("-")[1]))
    return summary(folder), folder


def state(out: Path) -> list[dict]:
    return json.loads((out / "trainer_state.json").read_text())["log_history"]


def figures(found: dict) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in found.items())


def check(holds: object, found: object) -> None:
    if not holds:
        raise SystemExit(f"not as expected: {found}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkout", type=Path, required=True, help="a checkout of OpenUnlearning")
    parser.add_argument("--out", type=Path, default=Path("runs/open_unlearning"))
    parser.add_argument("--only", nargs="*", help="some of the checks, by name")
    options = parser.parse_args()
    checks = Checks(options.checkout.resolve(), options.out.resolve())
    each: list[Callable[[], str]] = [
        checks.machine, checks.rate, checks.retain_model, checks.final_figures, checks.evaluation_alone,
        checks.harness, checks.max_steps, checks.attack,
    ]  # fmt: skip
    for one in each if options.only is None else [one for one in each if one.__name__ in options.only]:
        print(f"{one.__name__}: {one()}", flush=True)


if __name__ == "__main__":
    main()
