"""`evaluate`: the measures of a model, beside those of the original and of one retrained without the forget set."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from kunbr_fast.data import TextSettings, check_record
from kunbr_fast.data.items import Item
from kunbr_fast.evaluation.curves import RTTResult
from kunbr_fast.evaluation.folds import Fold
from kunbr_fast.evaluation.probability import spread
from kunbr_fast.evaluation.rtt import RTTConfig
from kunbr_fast.files.lock import hold
from kunbr_fast.files.models import load_model
from kunbr_fast.files.shown import plain, shown
from kunbr_fast.keywords import named_by, taken
from kunbr_fast.measures.answers import Readout, Subject
from kunbr_fast.measures.asked import has_letters
from kunbr_fast.measures.evaluation import JSON, MODELS, Evaluation, figures_of
from kunbr_fast.measures.layers import MOST as LAYER_ITEMS
from kunbr_fast.measures.passes import Asker, Passes, digest
from kunbr_fast.measures.registry import SETS, Measure
from kunbr_fast.measures.store import Store
from kunbr_fast.measures.suites import check_packages, chosen, lacking
from kunbr_fast.measures.value_vectors import ValueVectors, compare_values
from kunbr_fast.model.fingerprint import model_fingerprint
from kunbr_fast.model.frozen import frozen
from kunbr_fast.model.streaming import open_streamed
from kunbr_fast.model.weights import weights_of
from kunbr_fast.values import COUNT, check

EXAMPLES = 8
OF_TWO_QUESTIONS = "accuracy_letter_calibrated linear_probe logit_lens logit_lens_letter".split()
Records = Sequence[Mapping[str, Any] | Item]
Model = nn.Module | str | Path


@dataclasses.dataclass(frozen=True)
class Options:
    """The keywords of `evaluate`."""

    tokenizer: Any
    retain: Records = ()
    holdout: Records = ()
    original: Model | None = None
    retrained: Model | None = None
    suite: str = "core"
    measures: Sequence[str] = ()
    records: int | None = None
    layer_records: int = LAYER_ITEMS
    max_new_tokens: int = 128
    text: TextSettings = TextSettings()
    max_length: int | None = None
    folds: Sequence[Fold] = ()
    attack: RTTConfig | None = None
    rtt: RTTResult | None = None
    lm_eval: Sequence[str] = ()
    lm_eval_include: str | Path | None = None
    lm_eval_limit: int | None = None
    output_dir: str | Path | None = None
    resume: bool = False
    overwrite: bool = False
    dtype: str | None = None
    device: str = "cpu"
    stream: bool = False
    impl: str = "auto"
    progress: bool = True
    on_stage: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        for name in ("layer_records", "max_new_tokens"):
            check(name, getattr(self, name), COUNT)
        for name in ("records", "lm_eval_limit"):
            check(name, getattr(self, name), COUNT, null=True)
        for name in ("measures", "lm_eval"):
            if isinstance(found := getattr(self, name), str):
                raise ValueError(f"{name}={shown(found)}: expected a list of names, such as [{shown(found)}]")
        for name in ("lm_eval_include", "lm_eval_limit"):
            if getattr(self, name) is not None and not self.lm_eval:
                raise ValueError(f"{name} without lm_eval: name its tasks (lm_eval=)")
        if (self.attack is None) == bool(self.folds):
            raise ValueError("attack and folds: give both, what the attack does and the parts of the forget set")
        if self.attack is not None and self.rtt is not None:
            raise ValueError("attack and rtt: give one, an attack that is to be made or what one has brought back")


@named_by(Options)
def evaluate(model: Model, forget: Records, **options: Any) -> Evaluation:
    """Measures a model on what was to be forgotten and what was to be kept. It is not changed.

    model: a Hugging Face causal language model, or its folder. forget: records (`load_records`), or `Item`s, which have
    other answers too (`data.published.load_items`).

    Keywords, all but tokenizer optional:
    retain, holdout: records to keep, and records that no model was trained on.
    original, retrained: the model before unlearning, and one trained without the forget set; models or folders. Of
        folders one is in memory at a time.
    suite: "core" (likelihoods alone), "tofu", "muse", or "all"; measures: names in its place (docs/evaluation.md).
    records: at most so many of each set, spread evenly (None: all; folds are attacked whole); layer_records: of those
        whose hidden states are read. max_new_tokens: of generated answers. text, max_length: how records become
        tokens, as of `encode`.
    attack, folds: what is brought back by retraining on T, with these settings (`RTTConfig`); or rtt: what an attack
        has brought back already. The weights are the same afterwards.
    lm_eval: tasks of lm-evaluation-harness, for original and model; lm_eval_include: a folder of tasks of your own;
        lm_eval_limit: at most so many questions of each.
    output_dir: where evaluation.json and evaluation.csv are written; until then what is done is kept there, and resume
        goes on with it. overwrite: an evaluation that is there may go.
    dtype, device, stream: how folders are opened: stream reads layers when they run.
    impl: of kernels. progress: show progress bars. on_stage(text): told what begins.

    Each text goes through each model once, whatever measures ask for it, and what texts begin alike with once.

    Errors, before anything is computed: ValueError for unknown measures, records, missing packages, an output_dir that
    is not free. FloatingPointError for a model whose answers are not finite.
    """
    given = taken(Options, options, "evaluate")
    measures = chosen(given.suite, given.measures, attack=given.attack is not None)
    with contextlib.ExitStack() as stack:
        if given.output_dir is not None:
            stack.enter_context(hold(given.output_dir, given.on_stage or (lambda text: None)))
        return _Run(model, forget, measures, given).all()


class _Run:
    def __init__(self, model: Model, forget: Records, measures: Sequence[Measure], given: Options):
        self.given, self.measures = given, measures
        self.models = {"original": given.original, "retrained": given.retrained, "result": model}
        self.models = {name: one for name in MODELS if (one := self.models[name]) is not None}
        every = {"forget": forget, "retain": given.retain, "holdout": given.holdout}
        self.all_items = {name: _items(every[name], name) for name in SETS if len(every[name])}
        if "forget" not in self.all_items:
            raise ValueError("no records of what was to be forgotten: expected at least one")
        self.items = {name: spread(items, given.records) for name, items in self.all_items.items()}
        modules = [one for one in self.models.values() if isinstance(one, nn.Module)]
        streamed = given.stream or any(weights_of(one).streamed for one in modules)
        there = {*self.items, *self.models}
        there |= {"attack"} if given.attack is not None or given.rtt is not None else set()
        there |= {"generation"} if not streamed else set()
        self.missing = [{"measure": one.name, "why": why} for one in measures if (why := lacking(one, there))]
        self.able = [one for one in measures if not lacking(one, there)]
        if given.measures and self.missing:
            raise ValueError(f"measure {self.missing[0]['measure']} {self.missing[0]['why']}")
        check_packages(self.able, bool(given.lm_eval))
        self.needs = {need for one in self.able for need in one.needs}
        if streamed and given.lm_eval:
            raise ValueError("lm_eval: lm-evaluation-harness needs a model in memory: leave stream out (stream=True)")
        self.store = Store(given.output_dir)
        self._check_output()
        self.seconds: dict[str, float] = {}
        self.rtt, self.lm_eval = given.rtt, {}
        self.described: dict[str, dict[str, Any]] = {}

    def _check_output(self) -> None:
        given, begun = self.given, self.store.begun()
        if given.resume and given.output_dir is None:
            raise ValueError("resume without an output directory: there is nothing to go on with")
        if given.resume and not begun:
            raise ValueError(
                f"{plain(given.output_dir)} holds no unfinished evaluation: leave resume out (resume=True)"
            )
        if begun and not (given.resume or given.overwrite):
            raise ValueError(
                f"{plain(given.output_dir)} holds an unfinished evaluation: go on with it (resume=True), or replace it "
                "(overwrite=True)"
            )
        if given.output_dir is None:
            return
        if (Path(given.output_dir) / JSON).exists() and not (given.overwrite or given.resume):
            raise ValueError(
                f"{plain(given.output_dir)} holds an evaluation: give another directory, or replace it (overwrite=True)"
            )
        if begun and not given.resume:
            self.store.clear()

    def say(self, text: str) -> None:
        if self.given.on_stage is not None:
            self.given.on_stage(text)

    def all(self) -> Evaluation:
        asker = Asker(self.given.tokenizer, self.items, self.given, self.needs)
        said = {name: self._of_model(name, source, asker) for name, source in self.models.items()}
        subjects = {name: Subject(name, of) for name, of in said.items()}
        if "original" in subjects:
            subjects["original"] = dataclasses.replace(subjects["original"], retrained=subjects.get("retrained"))
        beside = {name: subjects.get(name) for name in ("original", "retrained")}
        more = beside | {"rtt": self.rtt, "value_vectors": self._value_vectors()}
        subjects["result"] = dataclasses.replace(subjects["result"], **more)
        self.say("measures, and their standard errors")
        with self._timed("measures"):
            figures, without = figures_of(self.able, subjects, list(self.items))
        missing = [*self.missing, *({"measure": one.name, "why": self._why_none(one)} for one in without)]
        found = Evaluation(
            "named" if self.given.measures else self.given.suite, self._settings(), self.described, self._sets(),
            figures, missing, _examples(asker, said), self.seconds, self.rtt, self.lm_eval or None,
        )  # fmt: skip
        if self.given.output_dir is not None:
            found.write(self.given.output_dir)
            self.store.clear()
        return found

    def _why_none(self, measure: Measure) -> str:
        """Why a measure that lacks nothing has no figure."""
        records = [one.record for of in self.items.values() for one in of]
        questions = [record for record in records if "question" in record]
        if questions and "letter" in measure.name and not has_letters(self.given.tokenizer, questions):
            return "needs a tokenizer that has one token for each of the letters of the choices"
        if questions and measure.name in OF_TWO_QUESTIONS:
            return "needs two questions or more, of different facts"
        return "does not apply to these records"

    # ------------------------------------------------ models

    def _of_model(self, name: str, source: Model, asker: Asker) -> dict[str, Readout]:
        self.say(f"the {name} model" + ("" if isinstance(source, nn.Module) else f", {plain(source)}"))
        with self._opened(source) as model:
            path = weights_of(model).directory
            path = path if isinstance(source, nn.Module) else source
            # where nothing is kept nobody needs to know which model it was: of one on a GPU that takes seconds
            kept = self.given.output_dir is not None
            identity = model_fingerprint(model, f"the {name} model's ") if kept else None
            self.described[name] = {"path": None if path is None else str(path), "fingerprint": identity}
            identity = f"{identity}-{asker.identity}" if kept else ""
            passes = Passes(name, model, asker, self.given, self.store, identity, self.seconds)
            said = passes.said()
            if name == "result" and self.given.attack is not None:
                self.rtt = passes.attacked()
            if self.given.lm_eval and name != "retrained":
                for task, figure in passes.harness().items():
                    of = {key: figure[key] for key in figure if key != "metric"}
                    self.lm_eval.setdefault(task, {"metric": figure["metric"]})[name] = of
        return said

    @contextlib.contextmanager
    def _opened(self, source: Model) -> Iterator[nn.Module]:
        """A model, whose parameters' requires_grad is as it was afterwards."""
        given, model = self.given, source
        if not isinstance(source, nn.Module):
            if given.stream:
                model = open_streamed(source, given.device, given.dtype)
            else:
                model = load_model(source, given.dtype, given.device)
        with frozen(model):
            yield model

    def _value_vectors(self) -> ValueVectors | None:
        """Of result and original, of which a folder is read layer by layer."""
        if "original" not in self.models or not any(one.name == "value_vector_cosine" for one in self.able):
            return None
        self.say("value vectors beside the original's")
        names, what = ("result", "original"), "value vectors"
        identity = "-".join(str(self.described[name]["fingerprint"]) for name in names)
        if (kept := self.store.get("result.values", identity)) is None:
            with self._timed(what):
                found = compare_values(
                    *(self.models[name] for name in names), self.given.dtype, what if self.given.progress else None
                )
            kept = {"found": found and dataclasses.asdict(found), "seconds": self.seconds[what]}, None
            self.store.put("result.values", identity, *kept)
        self.seconds[what] = kept[0]["seconds"]
        return kept[0]["found"] and ValueVectors(**kept[0]["found"])

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[what] = time.perf_counter() - start

    # ------------------------------------------------ what the result says of itself

    def _settings(self) -> dict[str, Any]:
        given = self.given
        names = "records layer_records max_new_tokens max_length dtype device stream impl".split()
        found = {name: getattr(given, name) for name in names} | {"text": dataclasses.asdict(given.text)}
        found["measures"] = [one.name for one in self.measures]
        return found if given.attack is None else found | {"attack": dataclasses.asdict(given.attack)}

    def _sets(self) -> dict[str, dict[str, Any]]:
        found = {}
        for name, items in self.items.items():
            files = (str(item.record.get("_where", "")).rpartition(":")[0] for item in items)
            forms = [item.form for item in items]
            found[name] = {
                "records": len(items),
                "of": len(self.all_items[name]),
                "files": list(dict.fromkeys(file for file in files if file)),
                "forms": {form: forms.count(form) for form in dict.fromkeys(forms)},
                "fingerprint": digest(items),
            }
        return found


def _items(records: Records, name: str) -> list[Item]:
    items = [one if isinstance(one, Item) else Item(dict(one)) for one in records]
    for i, item in enumerate(items):
        check_record(item.record, str(item.record.get("_where", f"{name} record {i}")))
    return items


def _examples(asker: Asker, said: Mapping[str, Mapping[str, Readout]]) -> list[dict[str, str]]:
    """A few questions of the forget set, spread evenly, with what each model answers."""
    found = []
    for i in spread(range(len(asker.items["forget"])), EXAMPLES):
        record = asker.items["forget"][i].record
        found.append({"set": "forget", "question": asker.asked_text("forget", i)})
        found[-1]["answer"] = asker.references["forget"][i]
        for name, of in said.items():
            found[-1][name] = _answer(of["forget"], i, record)
    return found


def _answer(said: Readout, i: int, record: Mapping[str, Any]) -> str:
    """What was generated; of a question, where nothing was, the choice that is taken; else the answer's probability."""
    if said.generated is not None:
        return said.generated[i]
    if i in said.questions and said.choice is not None:
        return str(record["choices"][said.choice.predictions[list(said.questions).index(i)]])
    return f"probability of the answer {said.answers[i].probability:.3g}" if said.answers else "-"
