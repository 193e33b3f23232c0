"""The passes of one model: likelihoods, generation, hidden states, the attack. Each is kept when it is done."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from kunbr_fast.data.items import Item
from kunbr_fast.evaluation.curves import RTTResult
from kunbr_fast.evaluation.reading import Reading, Rows
from kunbr_fast.evaluation.rtt import Attack
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


class Asker:
    """What all models are asked, by set. needs: of the measures. settings: the `Options` of `evaluate`."""

    def __init__(self, tokenizer: Any, items: Mapping[str, Sequence[Item]], settings: Any, needs: Collection[str]):
        self.tokenizer, self.items, self.needs, self._settings = tokenizer, items, needs, settings
        values = {name: [[{k: v for k, v in one.record.items() if k != "_where"}, one.paraphrase, one.perturbed]
                         for one in of] for name, of in items.items()}  # fmt: skip
        text = dataclasses.asdict(settings.text), settings.max_length
        self.identity = hashlib.sha256(json.dumps([values, text], sort_keys=True).encode()).hexdigest()
        self.references: dict[str, Sequence[str]] = {}
        self._prompts: dict[str, list[list[int]]] = {}

    def asked(self, decoder: Decoder) -> tuple[Reading, dict[str, AskedSet]]:
        """The texts as one decoder reads them."""
        how = self._settings
        reading, found = Reading(decoder), {}
        for name, items in self.items.items():
            asking = Asking(how.text, how.max_length, how.max_new_tokens, self.needs)
            found[name] = AskedSet(reading, name, items, self.tokenizer, decoder, asking)
            self.references[name], self._prompts[name] = found[name].references, found[name].prompts
        return reading, found

    def asked_text(self, name: str, i: int) -> str:
        """What item i is asked: its prompt as text."""
        ids = self._prompts[name][i]
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


class Passes:
    """seconds: of each pass, by the model's name and its own."""

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
        self.reading, self.asked = asker.asked(self.decoder)

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
        return {name: of.readout(rows, generated.get(name), states.get(name)) for name, of in self.asked.items()}

    def _kept(self, what: str, of: Sequence[Any], make: Callable[[str | None], tuple[dict, dict | None]]) -> tuple:
        """What a pass has found before, of the same, or finds now. of: what it depends on besides model and records."""
        identity = f"{self._identity}-{json.dumps(of)}"
        found = self._store.get(f"{self.name}.{what}", identity)
        if found is None:
            with self._pass(what) as title:
                found = make(title)
            self._store.put(f"{self.name}.{what}", identity, *found)
        return found

    def _likelihoods(self) -> Rows:
        def make(title: str | None) -> tuple[dict, dict]:
            with fused(self.decoder.model, self.settings.impl):
                return {}, self.reading.read(self.decoder, progress=title).to_dict()

        return Rows.from_dict(
            self._kept("likelihoods", [self.decoder.trees, sorted({*READ} & {*self.asker.needs})], make)[1]
        )

    def _generated(self) -> dict[str, list[str]]:
        prompts = [ids for of in self.asked.values() for ids in of.prompts]
        new, stop = self.settings.max_new_tokens, stop_tokens(self.decoder.model, self.asker.tokenizer)

        def make(title: str | None) -> tuple[dict, None]:
            how = dict(max_new_tokens=new, stop=stop, progress=title, limit=self.decoder.max_positions)
            tokens = generate(self.decoder.model, prompts, **how)
            return {"texts": [next(iter(self.asked.values())).decoded(ids) for ids in tokens]}, None

        texts = iter(self._kept("generation", [new, sorted(stop)], make)[0]["texts"])
        return {name: [next(texts) for _ in of.items] for name, of in self.asked.items()}

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
        given = self.settings
        data = [part for fold in given.folds for part in (fold.train_records, fold.questions)]
        identity = f"{self._identity}-{data_fingerprint(data)}-{json.dumps(dataclasses.asdict(given.attack))}"
        found = self._store.get(f"{self.name}.attack", identity)
        done = [] if found is None else list(found[0]["curves"])

        def keep(rows: list[dict]) -> None:
            done.extend(rows)
            self._store.put(f"{self.name}.attack", identity, {"curves": done})

        others = [item.record for item in self.asker.items.get("retain", ())]
        say = given.on_stage or (lambda text: None)
        with self._pass("attack"), scratch("kunbr-fast-") as folder:
            attack = Attack(self.decoder, self.asker.tokenizer, given.folds, given.attack, say, others)
            return attack.run(folder, given.progress, list(done), keep)

    def harness(self) -> dict[str, Any]:
        """Figures of lm-evaluation-harness, by task."""
        from kunbr_fast.measures.lm_eval import run_lm_eval

        given = self.settings

        def make(title: str | None) -> tuple[dict, None]:
            how = dict(limit=given.lm_eval_limit, include=given.lm_eval_include, progress=title is not None)
            return run_lm_eval(self.decoder.model, self.asker.tokenizer, list(given.lm_eval), **how), None

        of = [list(given.lm_eval), str(given.lm_eval_include), given.lm_eval_limit]
        return self._kept("lm-eval", of, make)[0]


def stop_tokens(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """With which a model ends what it generates: its generation configuration's and the tokenizer's."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else list(ends or ())
    return frozenset(int(one) for one in [*ends, tokenizer.eos_token_id] if one is not None)
