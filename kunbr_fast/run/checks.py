"""Bad settings and bad input fail here, not hours later at the stage that meets them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from kunbr_fast.data import is_record
from kunbr_fast.data.adversary import AdversarySettings
from kunbr_fast.data.overlap import settle
from kunbr_fast.data.text import say_separator
from kunbr_fast.evaluation.rtt import Attack
from kunbr_fast.files.models import check_same_architecture
from kunbr_fast.kernels.dispatch import resolve
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.fingerprint import model_fingerprint
from kunbr_fast.model.weights import weights_of
from kunbr_fast.objectives.criterion import Criterion
from kunbr_fast.parallel.group import Group
from kunbr_fast.parallel.sharded import check_shardable
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.context import RunContext, RunInputs
from kunbr_fast.run.identity import check_record, run_identity
from kunbr_fast.run.reporter import Reporter
from kunbr_fast.run.samples import Samples, overlap, to_samples, with_facts
from kunbr_fast.run.state import RunState
from kunbr_fast.run.validity import without_effect
from kunbr_fast.training.settings import Execution, check_master_weights
from kunbr_fast.training.sharded import NO_ADVERSARY


def prepare(
    inputs: RunInputs, config: KUnBRConfig, context: RunContext
) -> tuple[Decoder, Samples, Attack | None, RunState, str | None]:
    """The model's decoder, the samples, the attack, the opened state of a run and the given M_u's fingerprint; all that
    it is given is checked."""
    model, unlearned = inputs.model, inputs.unlearned
    if config.top_k == 0 and unlearned is not None:
        raise ValueError(
            "top_k=0 trains no block, and with an unlearned model (unlearned=) there is no warm-up: "
            "nothing would be trained. Leave one of them out"
        )
    if idle := without_effect(config):
        context.reporter.say(f"{', '.join(idle)}: no effect, no block is trained (top_k=0)")
    _check_streamed(inputs, config, context.group)
    decoder = Decoder(model)
    check_sharding(decoder, config, context, unlearned is None, config.rtt and bool(inputs.folds))
    criteria = _check_settings(decoder, config, config.execution(context.work), unlearned is None)
    samples = _samples(inputs, config, decoder, criteria, context.reporter)
    identity = model_fingerprint(model)
    if inputs.tokenizer is None and (inputs.folds or any(inputs.questions.values())):
        raise ValueError("questions and folds hold text: give tokenizer=")
    attack = _attack(inputs, config, decoder, samples, context.reporter)
    if isinstance(unlearned, nn.Module):
        check_same_architecture(model, unlearned, "unlearned")
    given = None if unlearned is None else model_fingerprint(unlearned, "the unlearned model's ")
    return decoder, samples, attack, _open_state(inputs, samples, config, context, identity, given), given


def _attack(
    inputs: RunInputs, config: KUnBRConfig, decoder: Decoder, samples: Samples, reporter: Reporter
) -> Attack | None:
    """The attack on the result, if there is to be one."""
    if not config.rtt or not inputs.folds:
        return None
    others = inputs.retain if is_record(inputs.retain[0]) else samples.retain
    return Attack(decoder, inputs.tokenizer, inputs.folds, config.attack(), reporter.say, others)


def _check_streamed(inputs: RunInputs, config: KUnBRConfig, group: Group) -> None:
    """ValueError for what cannot be done with a streamed model, or with one that is not. Tells a streamed one how many
    layers are to stay on the device."""
    model, unlearned = inputs.model, inputs.unlearned
    unlearned_streamed = isinstance(unlearned, nn.Module) and weights_of(unlearned).streamed
    if not weights_of(model).streamed:
        if unlearned_streamed:
            raise ValueError("the unlearned model is streamed and the original is not: open both with open_streamed")
        keep_resident(model, config.resident_layers)
        return
    if unlearned is None and config.adversary_every:
        raise ValueError(
            f"adversary_every={config.adversary_every}: the warm-up's adversary is a second model in memory, which a "
            "streamed one's training does not hold: give an unlearned model made elsewhere (unlearned=, --unlearned "
            "DIR; its adversary is then the blocks'), or take 0"
        )
    if unlearned is not None and (not unlearned_streamed or unlearned is model):
        raise ValueError("the original is streamed: open the unlearned model with open_streamed too, as another one")
    if group.size > 1:
        raise ValueError("a streamed model is for one process: run it without torchrun")
    keep_resident(model, config.resident_layers)


def keep_resident(model: nn.Module, layers: int) -> None:
    """Tells a streamed model how many of its layers are to stay on the device. ValueError for a model in memory."""
    if not layers:
        return
    if not weights_of(model).streamed:
        raise ValueError(
            f"resident_layers={layers}: the model is in memory whole: leave it out, or stream it (open_streamed, "
            "--stream)"
        )
    weights_of(model).reside(layers)


def check_sharding(decoder: Decoder, config: KUnBRConfig, context: RunContext, warm_up: bool, attacked: bool) -> None:
    """ValueError for what cannot be in parts. warm_up, attacked: whether there is to be one, and an attack."""
    if config.sharding == "none":
        return
    if context.group.size == 1:
        one = "this is one process (torchrun starts several)"
        context.reporter.say(f"sharding={config.sharding!r} changes nothing: {one}")
        return
    if config.sharding == "fsdp" and not warm_up and not attacked:
        context.reporter.say("sharding='fsdp' changes nothing: there is no warm-up and no attack, which it is for")
    check_shardable(decoder.model, decoder.layers, config.sharding)
    cover = config.sharding == "fsdp_cover"
    if config.adversary_every and (warm_up or cover):
        raise ValueError(NO_ADVERSARY.format(config.sharding))
    for name in ("cover_precision", "cache_dtype", "cache_bytes", "cuda_graphs") if cover else ():
        if (value := getattr(config, name)) != (default := getattr(KUnBRConfig, name)):
            raise ValueError(f"sharding='fsdp_cover', {name}={value!r}: expected {default!r}: leave one of them out")
    if cover and config.parallel == "blocks":
        raise ValueError("sharding='fsdp_cover', parallel='blocks': all ranks train each block: leave one of them out")


def _check_settings(decoder: Decoder, config: KUnBRConfig, execution: Execution, warm_up: bool) -> list[Criterion]:
    """What the run will minimise, on each block that may be chosen and in the warm-up."""
    for operation in ("grad_density", config.warmup_optimizer):
        resolve(operation, config.impl, decoder.device)
    for block in config.selectable(decoder.num_layers):
        execution.check(decoder, block, config.optimizer)
        config.block_settings().check_reach(decoder.streamed, execution.cover_precision)
    for name, used in (("master_weights", config.top_k > 0), ("warmup_master_weights", warm_up)):
        check_master_weights(getattr(config, name), decoder.dtype if used else None, name)
    return _criteria(decoder, config, warm_up)


def _criteria(decoder: Decoder, config: KUnBRConfig, warm_up: bool) -> list[Criterion]:
    blocks = config.selectable(decoder.num_layers)
    criteria = [config.criterion(block) for block in blocks]
    for block, criterion in zip(blocks, criteria):
        criterion.fit(decoder.num_layers, block)
    if warm_up:
        criteria.append(config.criterion(warmup=True))
        criteria[-1].fit(decoder.num_layers)
    return criteria


def _samples(
    inputs: RunInputs, config: KUnBRConfig, decoder: Decoder, criteria: Sequence[Criterion], reporter: Reporter
) -> Samples:
    alternate = next((c.alternate for c in criteria if c.alternate is not None), None)
    forget, facts = with_facts(inputs.forget, inputs.tokenizer, config, decoder, "forget", alternate)
    retain = to_samples(inputs.retain, inputs.tokenizer, config, decoder, "retain")
    say_separator(config.separator, inputs.forget, inputs.retain)
    settle(overlap(inputs, forget, retain), config.overlap, reporter.say)
    alternates = [sample["alternate"] for sample in forget] if alternate is not None else []
    if config.adversary_every == 0:
        return Samples(forget, retain, alternates)
    AdversarySettings().halves(facts, 0)  # its error now
    if not is_record(inputs.forget[0]):
        reporter.say("the forget set holds tokens: the adversary takes each sample for a fact (records can say more)")
    return Samples(forget, retain, alternates, facts)


def _open_state(
    inputs: RunInputs, samples: Samples, config: KUnBRConfig, context: RunContext, model: str, given: str | None
) -> RunState:
    """The state of the run that these models and data identify, which all ranks must have alike. model, given: the
    fingerprints of the original and of the given M_u."""
    identity = run_identity(inputs, samples, model)
    started = {"the model or the data": identity, "the unlearned model": given, "resume": context.resume}
    context.group.check_same(started | config.to_dict())
    say = context.reporter.say
    return RunState(context.work, identity, config, context.resume, context.writes, context.wait, say)


def check_finished(out: str | Path, report: Mapping[str, Any], inputs: RunInputs, config: KUnBRConfig) -> None:
    """ValueError unless the finished run in `out` was given these, and its model is as it was written."""
    inputs = inputs.allowing_equal_choices() if config.equal_choices == "allow" else inputs
    decoder, unlearned = Decoder(inputs.model), inputs.unlearned
    samples = _samples(inputs, config, decoder, _criteria(decoder, config, unlearned is None), Reporter())
    given = None if unlearned is None else model_fingerprint(unlearned, "the unlearned model's ")
    now = run_identity(inputs, samples, model_fingerprint(inputs.model))
    check_record(out, report, config, now, given)
