"""Our measures beside OpenUnlearning's own code, on a model small enough to be trained in seconds. No network, no GPU.

    git clone https://github.com/locuslab/open-unlearning
    pip install 'kunbr-fast[open-unlearning]'
    python examples/open_unlearning_measures.py --checkout open-unlearning --out runs/open_unlearning_measures

It trains a random Llama on invented facts, and another one without the forget set, calls the checkout's metrics and our
measures on files of TOFU's and MUSE's form, in fp32, and prints both figures. Exit status 1 where they differ by more
than 1e-5, relative. What is meant to differ is made alike first, and named in the last column:

    last token   exact memorisation, extraction strength, min-k and min-k++ leave out an answer's last token, there
    1/n          extraction strength is 1/n, there, where not even the last of n tokens is greedy (ours is 0)
    percent      PrivLeak is in percent, there
    question     ROUGE-L F1 reads up to a blank line or the next question, as its configuration of MUSE has it
    prompt       where a reference has its prompt's words again, they are cut out of it, there

(Divisors have 1e-10 added, there: nothing to be seen at the probabilities of this model.)
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import functools
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONDONTWRITEBYTECODE": "1"}

import numpy as np
import torch
import transformers as tf
from open_unlearning import NAMES, fact, workspace

from kunbr_fast.data.published import load_items
from kunbr_fast.integrations.open_unlearning_trainers import get_tokenizer
from kunbr_fast.measures.answers import Answer, Readout, Subject
from kunbr_fast.measures.evaluate import Options
from kunbr_fast.measures.passes import Asker, Passes
from kunbr_fast.measures.registry import MEASURES, READ
from kunbr_fast.measures.store import Store

TOLERANCE = 1e-5  # relative; both compute in fp32
COLUMNS = ["figure", "set", "open_unlearning", "ours", "apart", "made_alike", "transformers", "torch", "command"]
STEPS, LENGTH = 60, 24  # of training; tokens that are generated
CHAT = (  # ends at a line's end, as most templates do: no token reaches over where an answer begins
    "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
MODELS = ("result", "retrained")
TEMPLATE = {"apply_chat_template": True, "system_prompt": "You are a helpful assistant."}


def files(work: Path) -> None:
    """Beside forget, retain and holdout: TOFU's real authors (no paraphrases), and MUSE's three kinds of files."""
    workspace(work)
    facts = [fact(name, 1900 + 7 * i % 100) for i, name in enumerate(NAMES)]
    authors = [{key: one[key] for key in ("question", "answer", "perturbed_answer")} for one in facts[6:12]]
    texts = [f"{one['answer']} {one['paraphrased_answer']} It is known." for one in facts]
    words = [text.split() for text in texts]
    verbatim = [{"prompt": " ".join(one[:4]), "gt": " ".join(one[4:])} for one in words]
    written = {
        "authors": authors,
        "verbmem": verbatim[:8],
        "privleak_forget": [{"text": text} for text in texts[:8]],
        "privleak_holdout": [{"text": text} for text in texts[16:]],
    }
    for name, lines in written.items():
        (work / f"{name}.json").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def lines_of(work: Path, name: str) -> list[dict[str, Any]]:
    return list(map(json.loads, (work / f"{name}.json").read_text(encoding="utf-8").splitlines()))


# ---------------------------------------------------------------- theirs


class Theirs:
    """The checkout's data sets and metrics."""

    batch_size = 4

    def __init__(self, checkout: Path, work: Path, tokenizer: Any):
        sys.path.insert(0, str(checkout / "src"))
        import data.collators
        import data.pretraining
        import data.qa
        import evals.metrics

        self._data, self.metrics = data, evals.metrics.METRICS_REGISTRY
        self.work, self.tokenizer = work, tokenizer

    def _source(self, name: str) -> dict[str, Any]:
        file = {"path": "json", "data_files": str(self.work / f"{name}.json"), "split": "train"}
        return {"hf_args": file, "tokenizer": self.tokenizer, "template_args": TEMPLATE, "max_length": 512}

    @functools.cache  # noqa: B019 lives as long as the run
    def questions(self, name: str, answers: str = "answer", asked: bool = False) -> Any:
        return self._data.qa.QADataset(**self._source(name), answer_key=answers, predict_with_generate=asked)

    def texts(self, name: str, text: str = "text", asked: bool = False) -> Any:
        how = dict(text_key=text, insert_space=text == "gt", predict_with_generate=asked)
        return self._data.pretraining.CompletionDataset(**self._source(name), **how)

    def of(self, metric: str, model: Any, data: Any = None, side: str = "right", **given: Any) -> dict[str, Any]:
        """What the metric finds; given: its settings, and results of other metrics."""
        collator = self._data.collators.DataCollatorForSupervisedDataset(self.tokenizer, side, index="index")
        more = dict(data=data, collators=collator, batch_size=self.batch_size, tokenizer=self.tokenizer)
        with contextlib.redirect_stdout(io.StringIO()):
            return self.metrics[metric].evaluate_metric(model, metric, **more, **given)

    def rouge(self, model: Any, data: Any, kind: str, stop: Sequence[str] = ()) -> dict[str, Any]:
        from omegaconf import OmegaConf

        how = {"do_sample": False, "max_new_tokens": LENGTH, "use_cache": True}
        arguments = OmegaConf.create(how | ({"stopwords": list(stop)} if stop else {}))
        return self.of("rouge", model, data, "left", rouge_type=kind, generation_args=arguments)

    def ratio(self, model: Any, name: str, aggregator: str) -> dict[str, Any]:
        right = "answer" if name == "authors" else "paraphrased_answer"
        return self.of("truth_ratio", model, pre_compute=self._both(model, name, right), aggregator=aggregator)

    def against_wrong(self, model: Any, name: str) -> dict[str, Any]:
        return self.of("probability_w_options", model, pre_compute=self._both(model, name, "answer"))

    def _both(self, model: Any, name: str, right: str) -> dict[str, Any]:
        kinds = {"correct": right, "wrong": "perturbed_answer"}
        return {kind: self.of("probability", model, self.questions(name, answers)) for kind, answers in kinds.items()}


# ---------------------------------------------------------------- ours

FILES = ("forget", "retain", "holdout", "authors", "verbmem", "privleak_forget", "privleak_holdout")


def read(work: Path, models: dict[str, Any], tokenizer: Any) -> dict[str, dict[str, Readout]]:
    """What each model says about each file, as `kf.evaluate` reads it."""
    options = Options(tokenizer, max_new_tokens=LENGTH, progress=False)
    items = {name: load_items(work / f"{name}.json", chat=True) for name in FILES}
    asker = Asker(tokenizer, items, options, {*READ, "generation"})
    return {name: Passes(name, models[name], asker, options, Store(None), "", {}).said() for name in MODELS}


def without_last(said: Readout) -> Readout:
    def shorter(one: Answer) -> Answer:
        return Answer(*(getattr(one, f.name)[:-1] for f in dataclasses.fields(one)[:-1]), text=one.text)

    return dataclasses.replace(said, answers=[shorter(one) for one in said.answers])


# ---------------------------------------------------------------- the comparison

Row = tuple[str, str, float, float, str]  # figure, set, theirs, ours, what was made alike
ROUGE = {"rouge_l_recall": "rougeL_recall", "rouge_1_recall": "rouge1_recall", "rouge_l_f1": "rougeL_f1"}
NEXT = ("\n\n", "\nQuestion", "Question:")  # as its configuration of MUSE has them
RATIOS = {"truth_ratio": "closer_to_1_better", "truth_ratio_kept": "true_better", "truth_share": "prob_mean"}
ATTACKS = {"mia_loss": {}, "mia_zlib": {}, "mia_min_k": {"k": 0.4}, "mia_min_k_plus_plus": {"k": 0.4}}


def ours(name: str, subject: Subject, of: str = "forget") -> float:
    return MEASURES[name](subject, of).value


def answers(theirs: Theirs, model: Any, name: str, said: Readout) -> Iterator[Row]:
    """What has a mean over the questions of one file."""
    of = "forget" if name == "forget" else "retain"
    subject, data = Subject("", {of: said}), theirs.questions(name)
    yield "probability", name, theirs.of("probability", model, data)["agg_value"], ours("probability", subject, of), ""
    for measure, kind in ROUGE.items():
        stop = NEXT if kind == "rougeL_f1" else ()
        value = theirs.rouge(model, theirs.questions(name, asked=True), kind, stop)["agg_value"]
        yield measure, name, value, ours(measure, subject, of), ""
    for measure, aggregator in RATIOS.items():
        if of in MEASURES[measure].sets:
            yield measure, name, theirs.ratio(model, name, aggregator)["agg_value"], ours(measure, subject, of), ""
    value = theirs.against_wrong(model, name)["agg_value"]
    yield "probability_against_wrong", name, value, ours("probability_against_wrong", subject, of), ""
    yield from held(theirs, model, data, name, said)


def held(theirs: Theirs, model: Any, data: Any, name: str, said: Readout) -> Iterator[Row]:
    """What is memorised, token for token."""
    subject = shorter(Subject("", {"forget": said}))
    value = theirs.of("exact_memorization", model, data)["agg_value"]
    yield "exact_memorisation", name, value, ours("exact_memorisation", subject), "last token"
    strengths = MEASURES["extraction_strength"](subject, "forget").values
    alike = float(np.mean([max(one, 1 / len(of)) for one, of in zip(strengths, subject.sets["forget"].answers)]))
    value = theirs.of("extraction_strength", model, data)["agg_value"]
    yield "extraction_strength", name, value, alike, "last token, 1/n"


def attacks(theirs: Theirs, models: dict[str, Any], data: dict[str, Any], subject: Subject, kind: str) -> Iterator[Row]:
    """Membership inference, with and without the retrained model. data: forget and holdout."""
    short = shorter(subject)
    model, retrained = models["result"], models["retrained"]
    for name, settings in ATTACKS.items():
        last = name.startswith("mia_min_k")
        value = theirs.of(name, model, data, **settings)["agg_value"]
        yield name, kind, value, ours(name, short if last else subject), "last token" * last
    value = theirs.of("mia_reference", model, data, reference_model_path=models["folder"])["agg_value"]
    yield "mia_reference", kind, value, ours("mia_reference", subject), ""
    min_k = {name: theirs.of("mia_min_k", one, data, k=0.4) for name, one in (("forget", model), ("retain", retrained))}
    now = dict(pre_compute={"forget": min_k["forget"]}, ref_value=0.5)
    logs = {"reference_logs": {"retain_model_logs": {"retain": min_k["retain"]}}}
    for of, more, against in (("retrained", logs, short), ("0.5", {}, dataclasses.replace(short, retrained=None))):
        value = theirs.of("privleak", model, **now, **more)["agg_value"]
        yield "privleak", f"{kind}, to {of}", value, 100 * ours("privleak", against), "last token, percent"


def shorter(subject: Subject) -> Subject:
    """Without the last token of each answer."""
    sets = {name: without_last(said) for name, said in subject.sets.items()}
    return Subject(subject.name, sets, retrained=subject.retrained and shorter(subject.retrained))


def whole(theirs: Theirs, models: dict[str, Any], subject: Subject) -> Iterator[Row]:
    """Forget quality, and model utility of retain and real authors."""
    model = models["result"]
    now, then = (theirs.ratio(models[name], "forget", "closer_to_1_better") for name in ("result", "retrained"))
    logs = {"retain_model_logs": {"retain": then}}
    value = theirs.of("ks_test", model, pre_compute={"forget": now}, reference_logs=logs)["agg_value"]
    yield "forget_quality", "forget", value, ours("forget_quality", subject), ""
    figures = {
        "retain probability": theirs.of("probability", model, theirs.questions("retain")),
        "authors probability": theirs.against_wrong(model, "authors"),
    }
    for name in ("retain", "authors"):
        figures[f"{name} ratio"] = theirs.ratio(model, name, "true_better")
        figures[f"{name} rouge"] = theirs.rouge(model, theirs.questions(name, asked=True), "rougeL_recall")
    value = theirs.of("hm_aggregate", model, pre_compute=figures)["agg_value"]
    of = dataclasses.replace(subject, sets={"retain": subject.sets["retain"], "holdout": subject.sets["authors"]})
    yield "model_utility", "retain, authors", value, ours("model_utility", of, "retain"), ""


def compare(theirs: Theirs, models: dict[str, Any]) -> Iterator[Row]:
    model, said = models["result"], read(theirs.work, models, theirs.tokenizer)
    subject, texts = (
        Subject("result", sets["result"], retrained=Subject("retrained", sets["retrained"]))
        for sets in (
            {name: {of: said[name][of] for of in FILES[:4]} for name in MODELS},
            {name: {of: said[name][f"privleak_{of}"] for of in ("forget", "holdout")} for name in MODELS},
        )
    )
    for name in subject.sets:
        yield from answers(theirs, model, name, subject.sets[name])
    yield from attacks(theirs, models, {of: theirs.questions(of) for of in ("forget", "holdout")}, subject, "TOFU")
    yield from whole(theirs, models, subject)
    data = {of: theirs.texts(f"privleak_{of}") for of in ("forget", "holdout")}
    yield from attacks(theirs, models, data, texts, "MUSE")
    verbatim = said["result"]["verbmem"]
    verbatim = dataclasses.replace(
        verbatim,
        references=[line["gt"].replace(line["prompt"], "") for line in lines_of(theirs.work, "verbmem")],  # as theirs
    )
    value = theirs.rouge(model, theirs.texts("verbmem", "gt", asked=True), "rougeL_f1")["agg_value"]
    figure = ours("verbatim_memorisation", Subject("", {"forget": verbatim}))
    yield "verbatim_memorisation", "verbmem", value, figure, "prompt"
    yield from held(theirs, model, theirs.texts("verbmem", "gt"), "verbmem", verbatim)


def trained(work: Path, tokenizer: Any, forget: bool) -> Any:
    """The random model after some steps on retain, a third of holdout, and forget if asked: no figure at its end."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
    lines = [*lines_of(work, "retain"), *lines_of(work, "holdout")[::3], *(lines_of(work, "forget") if forget else [])]
    texts = [text for line in lines for text in (line["answer"], line["paraphrased_answer"])]
    for line in lines:
        turns = ("system", TEMPLATE["system_prompt"]), ("user", line["question"]), ("assistant", line["answer"])
        chat = [{"role": role, "content": content} for role, content in turns]
        chats = [chat, [*chat[:2], {"role": "assistant", "content": line["paraphrased_answer"]}]]
        texts += [tokenizer.apply_chat_template(one, tokenize=False) for one in chats]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkout", type=Path, required=True, help="a checkout of OpenUnlearning")
    parser.add_argument("--out", type=Path, default=Path("runs/open_unlearning_measures"))
    parser.add_argument("--csv", type=Path, help="write what was found here")
    options = parser.parse_args()
    work = options.out.resolve() / "work"
    os.environ.setdefault("HF_HOME", str(work / "hf"))
    files(work)
    tokenizer = get_tokenizer(tf.AutoTokenizer.from_pretrained)(work / "model", chat_template=CHAT)
    models = {"result": trained(work, tokenizer, True), "retrained": trained(work, tokenizer, False)}
    models["folder"] = str(work / "retrained")
    models["retrained"].save_pretrained(models["folder"])
    theirs = Theirs(options.checkout.resolve(), work, tokenizer)
    print(f"torch {torch.__version__}, transformers {tf.__version__}, {options.checkout}\n")
    print("| figure | set | OpenUnlearning | ours | apart | made alike |")
    print("| --- | --- | ---: | ---: | ---: | --- |")
    rows = []
    for figure, of, value, other, alike in compare(theirs, models):
        apart = abs(other - value) / max(abs(value), abs(other), 1e-300)
        print(f"| `{figure}` | {of} | {value:.6f} | {other:.6f} | {apart:.0e} | {alike} |", flush=True)
        rows.append([figure, of, value, other, apart, alike])
    if options.csv is not None:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            command = " ".join(["python", *sys.argv])
            csv.writer(file).writerows([COLUMNS, *([*row, tf.__version__, torch.__version__, command] for row in rows)])
    if wrong := [row for row in rows if not row[4] <= TOLERANCE]:
        raise SystemExit(f"{len(wrong)} figures differ by more than {TOLERANCE:.0e}, relative")


if __name__ == "__main__":
    main()
