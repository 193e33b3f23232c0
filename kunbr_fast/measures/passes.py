"""The passes of one model: likelihoods, generation, hidden states, the attack. Each is kept when it is done."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from kunbr_fast.data.items import Item
from kunbr_fast.evaluation.curves import RTTResult
from kunbr_fast.evaluation.reading import Reading, Rows, read_all
from kunbr_fast.evaluation.rtt import Attack
from kunbr_fast.files.atomic import sha256
from kunbr_fast.files.digests import tokenizer_fingerprint
from kunbr_fast.files.scratch import scratch
from kunbr_fast.measures.answers import Readout
from kunbr_fast.measures.asked import AskedSet, Asking
from kunbr_fast.measures.generation import generate
from kunbr_fast.measures.layers import LayerReadout, read_layers
from kunbr_fast.measures.registry import READ
from kunbr_fast.measures.store import Store
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.fingerprint import data_fingerprint
from kunbr_fast.model.patch import fused
from kunbr_fast.proofs import ensure_proven
from kunbr_fast.version import __version__


def digest(items: Sequence[Item]) -> str:
    """Of what the items say, but not of where they lie."""
    values = [
        [{k: v for k, v in one.record.items() if not k.startswith("_")}, one.paraphrase, one.perturbed, one.form]
        for one in items
    ]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class Asker:
    """What all models are asked, by set. needs: of the measures. settings: the `Options` of `evaluate`."""

    def __init__(self, tokenizer: Any, items: Mapping[str, Sequence[Item]], settings: Any, needs: Collection[str]):
        self.tokenizer, self.items, self.needs, self._settings = tokenizer, items, needs, settings
        self.references: dict[str, Sequence[str]] = {}
        self._prompts: dict[str, list[list[int]]] = {}
        self._asked: dict[tuple, dict[str, AskedSet]] = {}

    @functools.cached_property
    def identity(self) -> str:
        """Of all that is asked, and how: versions may read other texts."""
        settings = self._settings
        how = dataclasses.asdict(settings.text), settings.max_length, settings.impl, str(settings.device)
        sets = {name: digest(of) for name, of in self.items.items()}
        of = [__version__, sets, how, tokenizer_fingerprint(self.tokenizer)]
        return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()

    def asked(self, decoder: Decoder) -> dict[str, AskedSet]:
        """The texts as one decoder reads them, made once for all models that read the same."""
        tokens = decoder.model.get_input_embeddings().weight.shape[0]
        kind = tokens, decoder.max_positions, Reading(decoder).apart
        if kind not in self._asked:
            how = self._settings
            if how.on_stage is not None:
                how.on_stage("records as tokens")
            asking = Asking(how.text, how.max_length, how.max_new_tokens, self.needs)
            found = {
                name: AskedSet(Reading(decoder), name, items, self.tokenizer, decoder, asking)
                for name, items in self.items.items()
            }
            for name, of in found.items():
                self.references[name], self._prompts[name] = of.references, of.prompts
            self._asked = {kind: found}
        return self._asked[kind]

    def asked_text(self, name: str, i: int) -> str:
        """What item i is asked: its prompt as text, of a chat what the user says last."""
        ids, asked = self._prompts[name][i], self.items[name][i].record.get("messages", ())
        asked = [one["content"] for one in asked if one["role"] == "user" and isinstance(one["content"], str)]
        if asked:
            return asked[-1].strip()
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


class Passes:
    """No set shares a batch with another one: its figures have the same bits whatever others there are.

    seconds: of each pass, by the model's name and its own."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        asker: Asker,
        settings: Any,
        store: Store,
        identity: str,
        seconds: dict[str, float],
    ):
        self.name, self.asker, self.settings = name, asker, settings
        self._store, self._identity, self._seconds = store, identity, seconds
        self.decoder = Decoder(model)
        say = settings.on_stage or (lambda text: None)
        ensure_proven(self.decoder.device, {self.decoder.dtype}, settings.impl, say=say, progress=settings.progress)
        self.asked = asker.asked(self.decoder)
        if "generation" in asker.needs:
            for of in self.asked.values():
                of.check_prompts(self.decoder.max_positions, settings.max_new_tokens)
        self._attack = self._prepared() if name == "result" and settings.attack is not None else None

    @contextlib.contextmanager
    def _pass(self, what: str) -> Iterator[str | None]:
        """Times it; yields its bar's title, None for no bar."""
        title, start = f"{self.name}: {what}", time.perf_counter()
        yield title if self.settings.progress else None
        self._seconds[title] = time.perf_counter() - start

    def said(self) -> dict[str, Readout]:
        rows, generated, states = self._likelihoods(), {}, {}
        if "generation" in self.asker.needs:
            generated = self._generated()
        if "states" in self.asker.needs:
            states = self._states()
        return {name: of.readout(rows[name], generated.get(name), states.get(name)) for name, of in self.asked.items()}

    def _kept(self, what: str, of: Sequence[Any], make: Callable[[str | None], tuple[dict, dict | None]]) -> tuple:
        """What a pass has found before, of the same, or finds now. of: what it depends on besides model and records."""
        name, identity = f"{self.name}.{what}", f"{self._identity}-{json.dumps(of)}"
        if (found := self._store.get(name, identity)) is None:
            with self._pass(what) as title:
                values, tensors = make(title)
            kept = {"found": values, "seconds": self._seconds[f"{self.name}: {what}"]}
            self._store.put(name, identity, kept, tensors)
            return values, tensors
        self._seconds[f"{self.name}: {what}"] = found[0]["seconds"]
        return found[0]["found"], found[1]

    def _likelihoods(self) -> dict[str, Rows]:
        def make(title: str | None) -> tuple[dict, dict]:
            with fused(self.decoder.model, self.settings.impl):
                found = read_all(self.decoder, [of.reading for of in self.asked.values()], progress=title)
            rows = zip(self.asked, found)
            return {}, {f"{name}.{key}": value for name, one in rows for key, value in one.to_dict().items()}

        read = [self.decoder.trees, sorted({*READ} & {*self.asker.needs})]
        tensors = self._kept("likelihoods", read, make)[1]
        of = {name: {key.removeprefix(f"{name}."): one for key, one in tensors.items() if key.startswith(f"{name}.")}
              for name in self.asked}  # fmt: skip
        return {name: Rows.from_dict(values) for name, values in of.items()}

    def _generated(self) -> dict[str, list[str]]:
        new, stop = self.settings.max_new_tokens, stop_tokens(self.decoder.model, self.asker.tokenizer)

        def make(title: str | None) -> tuple[dict, None]:
            found = {}
            for name, of in self.asked.items():
                how = dict(max_new_tokens=new, stop=stop, limit=self.decoder.max_positions)
                tokens = generate(self.decoder.model, of.prompts, progress=title and f"{title}, {name}", **how)
                found[name] = [of.decoded(ids) for ids in tokens]
            return found, None

        return self._kept("generation", [new, sorted(stop)], make)[0]

    def _states(self) -> dict[str, LayerReadout]:
        how, sets = self.settings, {name: items for name, items in self.asker.items.items() if name != "holdout"}

        def make(title: str | None) -> tuple[dict, dict]:
            with fused(self.decoder.model, how.impl):
                found = read_layers(
                    self.decoder, self.asker.tokenizer, sets, most=how.layer_records, text=how.text,
                    max_length=how.max_length, progress=title,
                )  # fmt: skip
            values, tensors = {}, {}
            for name, one in found.items():
                values[name] = {"texts": one.texts, "items": list(one.items), "right": list(one.right)}
                own = {"states": one.states, "choice": one.choice, "letter": one.letter}
                tensors |= {f"{name}.{key}": value for key, value in own.items() if value is not None}
            return values, tensors

        values, tensors = self._kept("states", [how.layer_records], make)
        return {
            name: LayerReadout(
                **of, **{key: tensors.get(f"{name}.{key}") for key in ("states", "choice", "letter")}
            )
            for name, of in values.items()
        }  # fmt: skip

    def attacked(self) -> RTTResult:
        """What retraining on T brings back. Finished attacks are kept one by one."""
        given, others = self.settings, self._other_facts()
        data = [part for fold in given.folds for part in (fold.train_records, fold.questions)]
        identity = f"{self._identity}-{data_fingerprint([*data, others])}"
        identity += "-" + json.dumps([[fold.name for fold in given.folds], dataclasses.asdict(given.attack)])
        found = self._store.get(f"{self.name}.attack", identity)
        done = [] if found is None else list(found[0]["curves"])

        def keep(rows: list[dict]) -> None:
            done.extend(rows)
            self._store.put(f"{self.name}.attack", identity, {"curves": done})

        with self._pass("attack"), scratch("kunbr-fast-") as folder:
            return self._attack.run(folder, given.progress, list(done), keep)

    def _prepared(self) -> Attack:
        """All of it tokenised: what cannot be attacked is known before anything is read."""
        given, say = self.settings, self.settings.on_stage or (lambda text: None)
        return Attack(self.decoder, self.asker.tokenizer, given.folds, given.attack, say, self._other_facts())

    def _other_facts(self) -> list[Mapping[str, Any]]:
        """That the attack of this name teaches: the retain set."""
        return [item.record for item in self.asker.items.get("retain", ())]

    def harness(self) -> dict[str, Any]:
        """Figures of lm-evaluation-harness, by task."""
        from kunbr_fast.measures.lm_eval import run_lm_eval

        given = self.settings

        def make(title: str | None) -> tuple[dict, None]:
            how = dict(limit=given.lm_eval_limit, include=given.lm_eval_include, progress=title)
            return run_lm_eval(self.decoder.model, self.asker.tokenizer, list(given.lm_eval), **how), None

        own = sorted(Path(given.lm_eval_include).rglob("*")) if given.lm_eval_include is not None else []
        of = [list(given.lm_eval), given.lm_eval_limit, [[path.name, sha256(path)] for path in own if path.is_file()]]
        return self._kept("lm-eval", of, make)[0]


def stop_tokens(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """With which a model ends what it generates: its generation configuration's and the tokenizer's."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else list(ends or ())
    return frozenset(int(one) for one in [*ends, tokenizer.eos_token_id] if one is not None)
