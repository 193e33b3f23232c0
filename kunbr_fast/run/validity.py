"""Whether the settings of a run are what they may be, each by itself and all together."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args, get_type_hints

from kunbr_fast.density import attribution
from kunbr_fast.density.measure import reduction_of
from kunbr_fast.files.shown import shown
from kunbr_fast.run.setting import CHOSEN, NUMBERS, OF_SOME_ATTACKS, RATES, VISITS, counts_for, refuse_old
from kunbr_fast.training.settings import check_rates, check_unused
from kunbr_fast.values import check, parse_bytes, rates


def check_each(config: Any) -> None:
    """Gives each setting of a `KUnBRConfig` its type. ValueError for a value that it may not have."""
    hints = get_type_hints(type(config))
    for name in RATES:
        given = getattr(config, name)
        setattr(config, name, tuple(given) if isinstance(given, (list, tuple)) else given)
    for field in dataclasses.fields(config):
        refuse_old(f"{field.name}={getattr(config, field.name)}")
        value = _coerced(field.name, getattr(config, field.name), hints[field.name])
        setattr(config, field.name, value)
        choices = field.metadata["choices"]
        if choices and value is not None and value not in choices:
            raise ValueError(f"{field.name}={shown(value)}: expected one of {', '.join(choices)}")
    config.reduction = reduction_of(config.statistic, config.reduction)


def _coerced(name: str, value: Any, hint: Any) -> Any:
    kinds = get_args(hint) or (hint,)
    if name in RATES:
        return rates(value, name)
    if name in CHOSEN:
        return CHOSEN[name](value, name)
    if name in NUMBERS:
        return check(name, value, NUMBERS[name], type(None) in kinds)
    if name.endswith("_options"):
        if not isinstance(value, dict):
            raise ValueError(f"{name}={shown(value)}: expected a mapping such as {{beta: 0.1}}")
        return dict(value)
    if isinstance(value, kinds) and isinstance(value, bool) == (bool in kinds):
        return value
    words = {type(None): "null"}
    wanted = " or ".join(words.get(k) or getattr(k, "__name__", str(k)) for k in kinds)
    raise ValueError(f"{name}={shown(value)}: expected {wanted}")


def check_together(config: Any) -> None:
    """ValueError for settings, each checked, that do not go together, or of which one has no effect."""
    _check_selection(config)
    config.text()  # which looks at the day
    check_rates(config.warmup_lr, config.weight_decay, config.warmup_optimizer, name="warmup_lr")
    check_rates(config.block_lr, config.weight_decay, config.optimizer, name="block_lr")
    parse_bytes(config.cache_bytes, "cache_bytes")
    if config.cache_bytes is not None and config.cache == "file":
        raise ValueError(f"cache_bytes={config.cache_bytes}: no place is slower than cache=file: leave one of them out")
    if config.parallel == "blocks" and config.insertion == "cumulative":
        raise ValueError("parallel='blocks': cumulative blocks build on each other: leave it out, or take samples")
    if config.top_k == 0 and config.warmup_epochs == 0:
        raise ValueError("top_k=0, warmup_epochs=0: nothing would be trained: raise warmup_epochs, or top_k")
    check_unused(config)
    config.block_settings().check_reach(False, config.cover_precision)
    _check_objectives(config)
    _check_used(config)


def _check_selection(config: Any) -> None:
    rule, threshold = config.rule, config.threshold
    if (threshold is not None) != (rule == "threshold"):
        cure = "give threshold too (`kunbr-fast density` shows the layers' values)" if threshold is None else "take "
        cure += "" if threshold is None else "rule='threshold', or leave it out"
        raise ValueError(f"threshold={threshold}, rule={rule!r}: {cure}")
    if rule == "pareto" and config.statistic != "slug":
        raise ValueError(
            f"rule='pareto', statistic={config.statistic!r}: the front is of slug's importance and alignment: take "
            "statistic='slug', or another rule"
        )
    if rule != "top_k" and config.top_k not in (0, type(config).top_k):
        raise ValueError(
            f"top_k={config.top_k}, rule={rule!r}: the density says how many blocks there are: leave one of them out"
        )
    number, most = ("top_k", config.top_k) if rule == "top_k" else ("num_blocks", config.num_blocks + 1)
    if config.rounds * most > VISITS:
        raise ValueError(
            f"rounds={config.rounds}, {number}={getattr(config, number)}: expected at most {VISITS} visits of blocks "
            "in all, each of which has a data order of its own"
        )


OF_HIDDEN_LAYERS_TOO = ("cache_dtype", "cache_bytes")  # where the original's hidden states lie


def names_of_blocks(config: Any, hidden_layers: bool = False) -> list[str]:
    """The settings, of a `KUnBRConfig` or its type, that have no effect without blocks; hidden_layers: of a run with
    that retain loss."""
    fields = dataclasses.fields(config)
    names = {field.name for field in fields if field.metadata["stage"] in ("selection", "blocks")}
    names |= {"optimizer_device", "cuda_graphs", "parallel", "cache_bytes"}
    names -= {"top_k", *(OF_HIDDEN_LAYERS_TOO if hidden_layers else ())}
    return [field.name for field in fields if field.name in names]


def without_effect(config: Any) -> list[str]:
    """Those of them, of a run without blocks, that are not at their defaults."""
    names = names_of_blocks(config, config.retain_loss == "hidden_layers") if config.top_k == 0 else []
    return [name for name in names if getattr(config, name) != getattr(type(config), name)]


def check_blocks_used(config: Any) -> None:
    """ValueError for a setting of blocks where none is trained."""
    idle = without_effect(config)
    if "rule" in idle:  # it takes no top_k, so that another one is no cure
        raise ValueError(
            f"rule={config.rule!r}: no block is trained (top_k=0): leave it out; or leave out top_k, and name an "
            "objective in place of a method without blocks"
        )
    for name in idle:
        value = shown(getattr(config, name))
        cure = "retain_loss=hidden_layers" if name in OF_HIDDEN_LAYERS_TOO else "a top_k above 0"
        raise ValueError(f"{name}={value}: no block is trained (top_k=0): leave it out, or take {cure}")
    if config.top_k == 0 and config.warmup_objective is not None:
        raise ValueError(
            f"warmup_objective={shown(config.warmup_objective)}: no block is trained (top_k=0), so objective is of the "
            "warm-up: set that alone"
        )


def _check_objectives(config: Any) -> None:
    if config.block_hidden_coeff is not None and config.retain_loss != "hidden_layers":
        raise ValueError(
            f"block_hidden_coeff={config.block_hidden_coeff:g}: retain_loss={config.retain_loss!r} has none: leave it "
            "out, or take hidden_layers"
        )
    both = config.criterion(range(1)), config.criterion(range(1), warmup=True)  # which layers there are the model says
    if config.warmup_objective is None and config.warmup_objective_options:
        raise ValueError("warmup_objective_options without a warmup_objective: give objective_options, or both")
    if config.forget_loss_cap is not None and not any("forget_loss_cap" in c.options for c in both):
        raise ValueError(f"forget_loss_cap={config.forget_loss_cap}: {config.objective} has none: leave it out")
    if config.retain_loss not in {c.retain_loss for c in both}:
        own = "has its own retain term" if both[0].objective.states else "has no retain term"
        raise ValueError(f"retain_loss={config.retain_loss!r}: {config.objective} {own}: leave it out")
    kinds = {c.alternate for c in both if c.alternate is not None}
    if len(kinds) > 1:
        raise ValueError(
            f"{config.objective} and {config.warmup_objective} need different second answers "
            f"({', '.join(sorted(kinds))}): a run has one alternate for each forget record"
        )


def _check_used(config: Any) -> None:
    """ValueError for a setting of a mask, or of attacks, that are not asked for."""
    rule = attribution.RULES.get(config.mask, {})
    if config.mask_ratio is not None and (config.mask == "none" or "threshold" in rule):
        raise ValueError(f"mask_ratio={config.mask_ratio}: mask {config.mask} takes none: leave it out")
    if config.mask != "none" and config.mask_ratio is None and not rule:
        raise ValueError(f"mask {config.mask} has no published ratio: give mask_ratio")
    for name in OF_SOME_ATTACKS:
        is_used = any(counts_for(attack, name) for attack in config.rtt_attacks)
        if not is_used and (value := getattr(config, name)) != getattr(type(config), name):
            which = "the attack lora is" if "lora" in name else "an attack on all weights, such as full, is"
            raise ValueError(
                f"{name}={shown(value)}: {which} not among rtt_attacks ({', '.join(config.rtt_attacks)}): leave it "
                "out, or add it there"
            )
