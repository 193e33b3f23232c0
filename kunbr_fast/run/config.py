"""Every setting of a run, in one dataclass that reads and writes run.yaml."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from kunbr_fast.data import TARGETS, TextSettings
from kunbr_fast.data.adversary import AdversarySettings
from kunbr_fast.data.content import ALLOWANCES
from kunbr_fast.density import attribution
from kunbr_fast.density.measure import REDUCTIONS, STATISTICS, Density
from kunbr_fast.density.select import RULES, check_order, select_blocks
from kunbr_fast.density.watch import MODULES
from kunbr_fast.evaluation.accuracy import SCORINGS
from kunbr_fast.evaluation.attacks import ATTACKS
from kunbr_fast.evaluation.lora import Lora
from kunbr_fast.evaluation.rtt import RTTConfig
from kunbr_fast.files.atomic import atomic_write
from kunbr_fast.files.documents import read_yaml
from kunbr_fast.files.shown import plain, shown
from kunbr_fast.files.target import signed
from kunbr_fast.kernels.dispatch import IMPLEMENTATIONS
from kunbr_fast.memory import STORAGES, Place
from kunbr_fast.model.blocks import selectable_blocks
from kunbr_fast.model.low_precision import COVER_PRECISIONS
from kunbr_fast.model.sample_rows import CACHE_DTYPES
from kunbr_fast.objectives.criterion import EVERY_LAYER, Criterion
from kunbr_fast.objectives.hidden_layers import HiddenLayers
from kunbr_fast.objectives.methods import OBJECTIVES, RETAIN_LOSSES, check_options
from kunbr_fast.parallel.assign import PARALLEL
from kunbr_fast.parallel.sharded import SHARDING
from kunbr_fast.run.log import LOGS
from kunbr_fast.run.methods import settings_of
from kunbr_fast.run.setting import ADVERSARY, refuse_old, setting, unknown
from kunbr_fast.run.validity import check_blocks_used, check_each, check_together
from kunbr_fast.training.flat_buffer import OPTIMIZER_DEVICES, OPTIMIZERS
from kunbr_fast.training.settings import (
    INSERTIONS,
    MASTER_WEIGHTS,
    REACHES,
    BlockSettings,
    Execution,
    FullSettings,
)


@dataclasses.dataclass
class KUnBRConfig:
    """Settings of `kunbr_fast.unlearn`. Learning rates fit 8B models trained with Lion; small models want larger ones.

    Losses are means over samples of each sample's mean NLL per labelled token. An epoch is one pass over the forget
    set; the retain set is a shuffled stream beside it.
    """

    target: str = setting(
        "all",
        "tokens whose loss counts: all, answer, letter (of a question's answer) or number (the answer's last)",
        "data",
        TARGETS,
    )
    max_length: int | None = setting(None, "longest sample in tokens (default: the model's limit)", "data")
    separator: str = setting(
        "", r"between prompt and completion (default: nothing); as an option, \n is a line end, \t a tab", "data"
    )
    chat_date: str = setting("2024-07-26", "the day that a chat template takes for today", "data")
    split_long: bool = setting(
        True,
        "cut text lines of more than max_length tokens into several samples, each token with its loss once",
        "data",
    )
    overlap: str = setting(
        "error",
        "the same fact in two forget files (folds of the attack), or in forget and retain: error or allow",
        "none",
        ALLOWANCES,
    )
    equal_choices: str = setting("error", "equal choices of a question: error or allow", "none", ALLOWANCES)
    seed: int = setting(0, "seed of every data order", "data")
    batch_size: int = setting(6, "forget samples in a step", "data")
    retain_batch_size: int | None = setting(None, "retain samples in a step (default: batch_size)", "data")
    objective: str = setting(
        "gradient_difference", f"what the blocks (and the warm-up) minimise: {', '.join(OBJECTIVES)}", "data"
    )
    objective_options: dict[str, Any] = setting({}, "the objective's own settings, such as beta", "data")
    retain_loss: str = setting(
        "nll",
        "nll; kl: KL(original || now) over labelled tokens; kl_all: over all; hidden_mse: of the final hidden states; "
        "hidden_layers: nll, and the layers' outputs near the original's",
        "data",
        tuple(RETAIN_LOSSES),
    )
    retain_layers: str | tuple[int, ...] = setting(
        EVERY_LAYER.layers, "of hidden_layers: all, upper (the upper half), last, or the numbers of layers", "data"
    )
    hidden_coeff: float = setting(EVERY_LAYER.coeff, "of hidden_layers: the states' weight beside the nll", "training")
    retain_coeff: float = setting(1.0, "weight of the retain loss", "training")
    forget_loss_cap: float | None = setting(
        None,
        "a forget token whose NLL (nats) is beyond this gets no further push; off as published (gradient_difference, "
        "ga)",
        "training",
    )
    weight_decay: float = setting(0.0, "of warm-up and blocks", "training")
    adversary_every: int = setting(
        0,
        "steps after which an adversary, a copy that relearns half of the facts, starts anew; the forget loss is taken "
        "at its weights, on the other half (0: none, as published)",
        "training",
    )
    adversary_steps: int = setting(AdversarySettings.steps, "steps of the adversary when it starts", "training")
    adversary_lrs: tuple[float, ...] = setting(
        AdversarySettings.lrs, "learning rates of the adversary's AdamW, one is drawn each time it starts", "training"
    )
    adversary_frozen: bool = setting(
        AdversarySettings.frozen, "the adversary takes no step after these (else one before each step)", "training"
    )
    max_retain_loss: float | None = setting(
        None,
        "stop as diverged when the retain loss, averaged over 10 steps, is beyond this (default: 2 ln vocabulary)",
        "none",
    )

    adversary_reach: str = setting(
        "block",
        "what the adversary of a block relearns with: block, or model, all parameters, as an attacker would (no prefix "
        "cache for it, memory for a copy of the model and its AdamW)",
        "blocks",
        REACHES,
    )
    warmup_epochs: int = setting(3, "epochs of the full-parameter warm-up", "warmup")
    warmup_objective: str | None = setting(None, "objective of the warm-up (default: objective)", "data")
    warmup_objective_options: dict[str, Any] = setting({}, "options of warmup_objective", "data")
    warmup_lr: float = setting(2e-7, "learning rate of the warm-up", "warmup")
    warmup_optimizer: str = setting("lion", "lion or adamw", "warmup", OPTIMIZERS)
    warmup_master_weights: str = setting("none", "as master_weights, of all parameters", "warmup", MASTER_WEIGHTS)

    modules: str = setting("mlp", "whose gradients make the density: mlp, attention, norms or all", "density", MODULES)
    statistic: str = setting(
        "grad_l1",
        "of each layer's gradient g: grad_l1 sum|g|, grad_mean_abs mean|g|, grad_l2sq sum g^2, grad_l2 its root, "
        "grad_linf max|g|, fisher E g^2, fisher_ratio forget/retain, cosine of forget and retain (chooses no blocks), "
        "slug |g|/|w|",
        "density",
        STATISTICS,
    )
    reduction: str | None = setting(
        None,
        "sample: mean over samples of each one's norm; mean: norm of the mean gradient (default: the statistic's own, "
        "else sample)",
        "density",
        REDUCTIONS,
    )
    num_blocks: int = setting(8, "blocks of floor(layers / num_blocks) layers", "selection")
    top_k: int = setting(
        6, "how many of the densest blocks are trained (0: none, the warm-up's result is the model)", "selection"
    )
    rule: str = setting(
        "top_k",
        "which blocks: top_k, the densest; threshold, all that are denser; pareto, of slug, the front of much density "
        "and little alignment with the retain set",
        "selection",
        RULES,
    )
    threshold: float | None = setting(
        None, "of rule threshold: what a block's density, the sum of its layers' values, is above", "selection"
    )
    skip_last_layers: int = setting(2, "blocks that hold one of the last so many layers are not chosen", "selection")

    insertion: str = setting(
        "independent",
        "independent: each block goes back out before the next (as published); cumulative: it stays in place",
        "blocks",
        INSERTIONS,
    )
    rounds: int = setting(1, "how often all chosen blocks are visited, from low to high", "blocks")
    block_epochs: int = setting(3, "epochs of each visit", "blocks")
    block_lr: float = setting(2e-7, "learning rate of the block", "blocks")
    block_hidden_coeff: float | None = setting(
        None, "of hidden_layers, while a block is trained (default: hidden_coeff)", "blocks"
    )
    optimizer: str = setting("lion", "lion or adamw, started anew at each visit", "blocks", OPTIMIZERS)
    master_weights: str = setting(
        "fp32", "half precision and small updates: fp32 copies, none, stochastic rounding", "blocks", MASTER_WEIGHTS
    )
    cover_precision: str = setting(
        "none",
        "frozen weights above the block: none (exact), fp8, int8 or nf4, an approximation that the report measures",
        "blocks",
        COVER_PRECISIONS,
    )
    mask: str = setting(
        "none",
        f"the weights of a block that may change: none is all of them, or {', '.join(attribution.METHODS)}",
        "blocks",
        ("none", *attribution.METHODS),
    )
    mask_ratio: float | None = setting(
        None, "the part of the mask's scores that is chosen (default: as published)", "blocks"
    )
    cache: str = setting(
        "auto",
        "where activations lie (prefix cache, the original's hidden states, a streamed model's between two layers): "
        "device, host, file or auto",
        "none",
        STORAGES,
    )
    cache_bytes: int | str | None = setting(
        None,
        "the most that it takes there (8GiB), samples used later wait in a slower place (default: no limit)",
        "none",
    )
    cache_dtype: str = setting(
        "none",
        "how it is kept: none (the model's own dtype, exact), bf16 or fp8, an approximation that the report measures",
        "blocks",
        CACHE_DTYPES,
    )
    optimizer_device: str = setting(
        "device",
        "where a block's optimiser state and the weights that it updates lie: device or host (main memory)",
        "none",
        OPTIMIZER_DEVICES,
    )
    micro_batch_tokens: int | None = setting(
        None,
        "the most tokens that go through at once; the step is the same (default: all, fewer where memory runs out)",
        "none",
    )
    resident_layers: int = setting(0, "of a streamed model: how many of the first layers stay on the device", "none")
    checkpoint_every: int | None = setting(None, "steps between checkpoints (default: an epoch)", "none")
    log_to: tuple[str, ...] = setting(
        (), f"write each step's losses, and the result's figures, to OUT/logs: {', '.join(LOGS)}", "none"
    )

    scoring: str = setting(
        "letter", "letter: A/B/C/D after the question; choice: likelihood of the choice", "evaluation", SCORINGS
    )
    rtt: bool = setting(True, "attack the result (retraining on T)", "none")
    rtt_lrs: tuple[float, ...] = setting((1e-6, 5e-6, 1e-5), "learning rates of the attack", "none")
    rtt_attacks: tuple[str, ...] = setting(("full",), f"kinds of attack: {', '.join(ATTACKS)}, or all", "none")
    rtt_master_weights: str = setting("none", "as master_weights, of attacks on all weights", "rtt", MASTER_WEIGHTS)
    rtt_lora_rank: int = setting(Lora.rank, "rank of the attack lora (its alpha is twice that)", "rtt")
    rtt_lora_targets: tuple[str, ...] = setting(
        Lora.targets, "linear layers of the attack lora: all, attention, mlp, or names such as q_proj", "rtt"
    )
    rtt_epochs: int = setting(5, "epochs of each attack", "rtt")
    rtt_batch_size: int = setting(8, "batch size of the attack", "rtt")
    rtt_target: str = setting("all", "tokens the attack trains on", "rtt", TARGETS)
    gradient_checkpointing: bool = setting(
        False,
        "keep only each layer's input for the backward pass and run it again there: less memory, the same result",
        "none",
    )
    cuda_graphs: bool = setting(False, "capture a block's steps as CUDA graphs (gradient difference and ga)", "none")
    parallel: str = setting(
        "auto",
        "with several processes (torchrun): blocks, each trained by one; samples, each step's spread over all; auto",
        "none",
        PARALLEL,
    )
    sharding: str = setting(
        "none",
        "with several processes: fsdp, each holds a part of what warm-up and attack train; fsdp_cover, of the layers "
        "around a block too, which all train together; none, all",
        "none",
        SHARDING,
    )
    impl: str = setting("auto", "auto, cuda, triton or torch", "none", ("auto", *IMPLEMENTATIONS))

    def __new__(cls, *args: Any, **settings: Any) -> KUnBRConfig:
        if "method" in settings:
            raise ValueError("method= is no setting, but names some: KUnBRConfig.from_dict({'method': ..., ...})")
        for name in settings:
            refuse_old(name)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_each(self)
        check_together(self)

    @property
    def _wanted(self) -> int | None:
        """How many blocks are chosen; None where the density says it."""
        return self.top_k if self.rule == "top_k" else None

    def selectable(self, num_layers: int) -> list[range]:
        """The blocks that may be chosen, where any are to be. ValueError where they are too few, and for a statistic
        that chooses none."""
        if self.top_k == 0:
            return []
        check_order(self.statistic)
        return selectable_blocks(num_layers, self.num_blocks, self._wanted, self.skip_last_layers)

    def select(self, density: Density) -> list[range]:
        """The blocks that are trained."""
        how = {"rule": self.rule, "threshold": self.threshold}
        return select_blocks(density, self.num_blocks, self._wanted, self.skip_last_layers, **how) if self.top_k else []

    def criterion(self, block: range | None = None, warmup: bool = False) -> Criterion:
        """What the steps on `block` minimise, or those of the warm-up (block None: all layers are trained)."""
        objective, options = self.objective, self.objective_options
        if warmup and self.warmup_objective is not None:
            objective, options = self.warmup_objective, self.warmup_objective_options
        check_options(objective, options)
        found = OBJECTIVES[objective]
        # of two objectives one may not take a setting that is there for the other
        retain_loss = self.retain_loss if found.retain and not found.states else "nll"
        ignored = retain_loss != self.retain_loss
        coeff = self.hidden_coeff if warmup or self.block_hidden_coeff is None else self.block_hidden_coeff
        return Criterion(
            objective,
            options,
            retain_loss=retain_loss,
            hidden=EVERY_LAYER if ignored else HiddenLayers(self.retain_layers, coeff),
            retain_coeff=self.retain_coeff,
            forget_loss_cap=self.forget_loss_cap if "forget_loss_cap" in found.options else None,
            block=block,
        )

    def text(self) -> TextSettings:
        """How records become text."""
        return TextSettings(self.separator, self.chat_date, self.split_long)

    def attack(self) -> RTTConfig:
        """The RTT attack's settings."""
        how = {
            "target": self.rtt_target, "text": self.text(), "max_length": self.max_length, "overlap": self.overlap,
            "attacks": self.rtt_attacks, "lora_rank": self.rtt_lora_rank, "lora_targets": self.rtt_lora_targets,
            "master_weights": self.rtt_master_weights,
        }  # fmt: skip
        return RTTConfig(
            self.rtt_lrs, self.rtt_epochs, self.rtt_batch_size, scoring=self.scoring, seed=self.seed, **how
        )

    def full_settings(self, seed: int = 0) -> FullSettings:
        """What the warm-up trains. seed: of what it draws."""
        given = self._settings("weight_decay", *ADVERSARY) | {"master_weights": self.warmup_master_weights}
        return FullSettings(self.warmup_lr, self.warmup_optimizer, adversary_seed=seed, rounding_seed=seed, **given)

    def block_settings(self, seed: int = 0, mask: Mapping[str, torch.Tensor] | None = None) -> BlockSettings:
        """What a visit of a block trains, apart from its criterion. seed: of what it draws."""
        names = ("optimizer", "weight_decay", "insertion", "master_weights", "adversary_reach", *ADVERSARY)
        seeds = dict(adversary_seed=seed, rounding_seed=seed)
        return BlockSettings(self.block_lr, mask=mask, **seeds, **self._settings(*names))

    def _settings(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}

    def execution(self, directory: Path) -> Execution:
        """How trainings run; directory: where activations lie that are kept in files."""
        names = {field.name for field in dataclasses.fields(Execution)} - {"place"}
        return Execution(place=Place(self.cache, directory), **{name: getattr(self, name) for name in names})

    @property
    def retain_size(self) -> int:
        return self.retain_batch_size or self.batch_size

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "config", of_a_run: bool = False) -> KUnBRConfig:
        """Refuses a key that does not exist, with the nearest one that does. `method` names a method (`run.methods`),
        whose settings the others win over. Without blocks what is for these alone is refused too, but in the record
        of_a_run, which Python may have begun so."""
        known = [field.name for field in dataclasses.fields(cls)]
        # earlier versions wrote it into every run.yaml; "auto" is what stands for it now
        values = {key: value for key, value in values.items() if (key, value) != ("activations", "auto")}
        method = values.pop("method", None)
        for key in values:
            if key not in known:
                refuse_old(str(key), f"{where}: ")
                raise ValueError(f"{where}: unknown setting {unknown(key, [*known, 'method'])}")
        try:
            found = cls(**({} if method is None else settings_of(method, values)) | values)
            if not of_a_run:
                check_blocks_used(found)
            return found
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> KUnBRConfig:
        """Reads run.yaml. Errors name the file."""
        return cls.from_dict(cls.read(path), plain(path))

    @staticmethod
    def read(path: str | Path) -> dict[str, Any]:
        """What run.yaml says, for `from_dict`."""
        values = read_yaml(path)
        if values is not None and not isinstance(values, dict):
            raise ValueError(f"{plain(path)}: got {shown(values)}, expected lines of 'setting: value'")
        return values or {}

    def save(self, path: str | Path) -> None:
        with atomic_write(path) as file:
            file.write(signed(yaml.safe_dump(self.to_dict(), sort_keys=False)).encode())

    @classmethod
    def stage_of(cls, name: str) -> str:
        """The stage whose result a setting changes, "none" if it changes none; "data", of all, for what is none."""
        return cls.__dataclass_fields__[name].metadata["stage"] if name in cls.__dataclass_fields__ else "data"

    def changed(self, other: dict[str, Any]) -> dict[str, str]:
        """The settings that differ from `other` (a `to_dict`), each with the stage whose result it changes."""
        mine, default = self.to_dict(), type(self)().to_dict()  # a run of an older version lacks newer settings
        return {
            field.name: field.metadata["stage"]
            for field in dataclasses.fields(self)
            if mine[field.name] != other.get(field.name, default[field.name]) and field.metadata["stage"] != "none"
        }


# what `help` and editors show: `__new__`'s has no names
KUnBRConfig.__signature__ = inspect.Signature(list(inspect.signature(KUnBRConfig.__init__).parameters.values())[1:])
