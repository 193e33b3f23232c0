"""The settings of a training as values: what is trained, and how it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kunbr_fast.data.adversary import AdversarySettings
from kunbr_fast.files.shown import shown
from kunbr_fast.kernels.dispatch import resolve
from kunbr_fast.kernels.optimizers.op import Watched
from kunbr_fast.memory import Place
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.low_precision import check_cover
from kunbr_fast.objectives.criterion import EVERY_LAYER, Criterion
from kunbr_fast.objectives.hidden_layers import HiddenLayers
from kunbr_fast.training import flat_buffer
from kunbr_fast.training.graphs import check_cuda_graphs
from kunbr_fast.values import COUNT_OR_NONE, FLOAT32, NOT_NEGATIVE, Whole, check

ADVERSARY = ("adversary_steps", "adversary_lrs", "adversary_frozen", "adversary_reach")  # of one that is there
INSERTIONS = ("independent", "cumulative")
REACHES = ("block", "model")
MASTER_WEIGHTS = ("fp32", "none", "stochastic")
PARAMETERS = 2**20  # that have random bits of their own, for each seed
ROUNDING_SEED = Whole(0, 2**42 - 1)  # times PARAMETERS, what the optimisers take


def check_rates(
    lr: float, weight_decay: float, optimizer: str, betas: tuple[float, float] | None = None, name: str = "lr"
) -> None:
    """ValueError that names the setting (name: of lr) where an update's numbers are more than fp32 holds, as kernels
    take them."""
    lr, decay = check(name, lr, NOT_NEGATIVE), check("weight_decay", weight_decay, NOT_NEGATIVE)
    if lr * decay > FLOAT32[0]:
        raise ValueError(
            f"{name}={lr:g}, weight_decay={decay:g}: expected a product that fp32 holds: lower one of them"
        )
    first = lr / (1 - (betas or flat_buffer.BETAS[optimizer])[0]) if optimizer == "adamw" else lr
    if first > FLOAT32[0]:
        raise ValueError(f"{name}={lr:g}: AdamW's first step is {first:g}, more than fp32 holds: lower it")


def check_unused(settings: Any) -> None:
    """ValueError for a setting of an adversary where there is none. settings: a dataclass that has some of `ADVERSARY`,
    checked."""
    for field in dataclasses.fields(settings) if not settings.adversary_every else ():
        if field.name in ADVERSARY and (value := getattr(settings, field.name)) != field.default:
            raise ValueError(
                f"{field.name}={shown(value)}: there is no adversary (adversary_every=0): leave it out, or set "
                "adversary_every"
            )


def check_master_weights(value: Any, dtype: torch.dtype | None = None, name: str = "master_weights") -> None:
    """ValueError that names the setting unless it is one of `MASTER_WEIGHTS`, and (dtype: of the model) can be."""
    if value not in MASTER_WEIGHTS:
        raise ValueError(f"{name}={shown(value)}: expected one of {', '.join(MASTER_WEIGHTS)}")
    if value == "stochastic" and dtype == torch.float16:
        raise ValueError(
            f"{name}='stochastic': the model is in float16, and rounding is for bfloat16: take fp32, or load the model "
            "in bfloat16 (--dtype bfloat16)"
        )


@dataclasses.dataclass(frozen=True)
class FullSettings:
    """What a training of all parameters does; betas default to the optimiser's own.

    master_weights: for half-precision parameters, where small updates would be rounded away: "fp32", copies that the
    optimiser updates; "stochastic", of bf16 parameters: the optimiser's state is in fp32, and an updated value is
    rounded to one of its two neighbours, on average itself; "none".
    rounding_seed: of "stochastic", whose bits depend on it, the parameter, the step and the place in it alone.
    An adversary rounds as what is trained, and of a block has masters too; of all parameters it has none.
    adversary_every: above 0, the forget loss is taken at the weights of an adversary that relearns other facts and
    starts anew after so many steps; adversary_*: as in `data.AdversarySettings`. It costs a copy of what is trained,
    AdamW's two moments, and a forward and backward pass over a forget batch for each of its steps.
    """

    lr: float
    optimizer: str = "adamw"
    betas: tuple[float, float] | None = None
    weight_decay: float = 0.0
    master_weights: str = "none"
    rounding_seed: int = 0
    adversary_every: int = 0
    adversary_steps: int = AdversarySettings.steps
    adversary_lrs: tuple[float, ...] = AdversarySettings.lrs
    adversary_frozen: bool = AdversarySettings.frozen
    adversary_seed: int = AdversarySettings.seed

    def __post_init__(self) -> None:
        if self.lr is None:
            raise TypeError("lr is missing: give a learning rate")
        flat_buffer.check_optimizer(self.optimizer)
        check_rates(self.lr, self.weight_decay, self.optimizer, self.betas)
        check_master_weights(self.master_weights)
        check("rounding_seed", self.rounding_seed, ROUNDING_SEED)
        check("adversary_every", self.adversary_every, COUNT_OR_NONE)
        for lr in self._adversary(self.adversary_every or 1).lrs:
            check_rates(lr, 0.0, "adamw", name="adversary_lrs")
        check_unused(self)

    @property
    def adversary(self) -> AdversarySettings | None:
        """None where there is none."""
        return self._adversary(self.adversary_every) if self.adversary_every else None

    def _adversary(self, every: int) -> AdversarySettings:
        names = [field.name for field in dataclasses.fields(AdversarySettings) if field.name != "every"]
        return AdversarySettings(every, **{name: getattr(self, f"adversary_{name}") for name in names})

    def make_optimizer(self, params: Sequence[torch.Tensor], impl: str, number: int = 0) -> Watched:
        """The optimiser over `params`, which are of one dtype. number: among those with random bits of their own."""
        chosen, seed = (self.lr, self.betas, self.weight_decay), None
        if params[0].dtype in flat_buffer.HALF:
            check_master_weights(self.master_weights, params[0].dtype)
            seed = self.rounding(number)
        return flat_buffer.make_optimizer(self.optimizer, params, *chosen, impl=impl, seed=seed)

    def rounding(self, number: int) -> int | None:
        """The seed of a parameter's random bits; None where rounding is to nearest."""
        return self.rounding_seed * PARAMETERS + number if self.master_weights == "stochastic" else None

    def instead_of_masters(self, dtype: torch.dtype, name: str = "master_weights") -> list[str]:
        """What needs less memory than the masters of a model in `dtype`, where it has any. name: of the setting."""
        if self.master_weights != "fp32" or dtype not in flat_buffer.HALF:
            return []
        stochastic = [f'{name}="stochastic" (no copies of bf16 weights)'] * (dtype == torch.bfloat16)
        return [*stochastic, f'{name}="none" (small updates are rounded away)']

    @property
    def adversary_rounding(self) -> int | None:
        """`rounding` of its first parameter."""
        return self.rounding(PARAMETERS // 2)

    def warn_if_updates_vanish(self, params: Sequence[torch.Tensor], cure: str) -> None:
        """Logs `cure` where most updates of half-precision weights will be rounded away."""
        if self.master_weights == "none":
            flat_buffer.warn_if_updates_vanish(params, self.lr, cure)


@dataclasses.dataclass(frozen=True)
class BlockSettings(FullSettings):
    """What the re-insertion of a block trains.

    objective, objective_options, retain_loss, retain_layers, hidden_coeff, retain_coeff, forget_loss_cap: what a step
    minimises, see `Criterion`; retain_layers and hidden_coeff are its `HiddenLayers`.
    insertion: "cumulative" leaves the trained block in the original for the next ones, "independent" takes it out.
    mask: for some of the block's parameters, by name, a bool tensor of its shape: where it is False the weight keeps
    its bits (M_u's), whatever optimiser and weight decay. `attribute(...).mask()` makes them. Names outside the block
    have no effect, and what has no mask may change everywhere.
    adversary_reach: what the adversary relearns with: "block", what is trained, or "model", all parameters of the model
    that the block is in, as an attacker would. That costs a copy of the model and AdamW's moments of it, and passes of
    the adversary through all layers, without the prefix cache.
    """

    optimizer: str = "lion"
    retain_coeff: float = 1.0
    objective: str = "gradient_difference"
    objective_options: Mapping[str, Any] | None = None
    retain_loss: str = "nll"
    retain_layers: str | Sequence[int] = EVERY_LAYER.layers
    hidden_coeff: float = EVERY_LAYER.coeff
    forget_loss_cap: float | None = None
    insertion: str = "independent"
    master_weights: str = "fp32"
    mask: Mapping[str, torch.Tensor] | None = None
    adversary_reach: str = "block"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.insertion not in INSERTIONS:
            raise ValueError(f"insertion={self.insertion!r}: expected one of {', '.join(INSERTIONS)}")
        if self.adversary_reach not in REACHES:
            raise ValueError(f"adversary_reach={self.adversary_reach!r}: expected one of {', '.join(REACHES)}")

    @property
    def reaches_model(self) -> bool:
        """Whether there is an adversary, of all parameters."""
        return bool(self.adversary_every) and self.adversary_reach == "model"

    def check_reach(self, streamed: bool, cover_precision: str) -> None:
        """ValueError where not all of the model is there to relearn with."""
        if self.reaches_model and (streamed or cover_precision != "none"):
            why = "a streamed model's weights are" if streamed else "a cover in low precision is"
            raise ValueError(f"adversary_reach='model': {why} not there to relearn with: take 'block'")

    def criterion(self, block: range, given: Criterion | None = None) -> Criterion:
        """What a step of `block` minimises: `given`, or by the settings. ValueError where both name something."""
        mine = dict(objective=self.objective, options=self.objective_options or None, retain_loss=self.retain_loss)
        mine |= dict(retain_coeff=self.retain_coeff, forget_loss_cap=self.forget_loss_cap)
        mine |= dict(hidden=HiddenLayers(self.retain_layers, self.hidden_coeff))
        if given is None:
            return Criterion(**mine, block=block)
        if tuple(mine.values()) != ("gradient_difference", None, "nll", 1.0, None, EVERY_LAYER):
            raise ValueError(
                "criterion= stands for objective, objective_options, retain_loss, retain_layers, hidden_coeff, "
                "retain_coeff and forget_loss_cap: give those or it"
            )
        return given


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a training runs. Only `cover_precision` changes what it computes.

    impl: who runs the fused layers (`patched`), the loss and the optimiser.
    gradient_checkpointing: keep each layer's input only, and run the layer again in the backward pass. Same result.
    cuda_graphs: steps run in buckets of fixed sizes, each captured once as a CUDA graph (`StepGraphs`), where the
    objective's weights are known before the pass (gradient difference, ga); `Unavailable` if that fails.
    micro_batch_tokens: the most tokens that go through at once; a larger step goes in micro-batches, whose gradients
    add up to the same up to summation order. Where memory runs out, a step goes in smaller ones all by itself.
    optimizer_device: "host" keeps the optimiser's state and the weights that it updates in main memory, where the
    update runs (by torch), and the original's own block as long as M_u's is in its place (nothing else may look at
    those weights meanwhile). The same bits on a CPU; a GPU's kernels round otherwise than the host.
    cover_precision: fp8, int8 or nf4 keep the weights of the linear layers above the block in so many bits; the
    exact ones wait in main memory, a streamed model's in its files. An approximation, see `model.low_precision`;
    `gradient_cosine` tells how good.
    place: where the activations of a streamed model's step wait between two layers.
    """

    impl: str = "auto"
    gradient_checkpointing: bool = False
    cuda_graphs: bool = False
    micro_batch_tokens: int | None = None
    optimizer_device: str = "device"
    cover_precision: str = "none"
    place: Place = Place()

    def __post_init__(self) -> None:
        if self.micro_batch_tokens is not None and self.micro_batch_tokens < 1:
            raise ValueError(f"micro_batch_tokens={self.micro_batch_tokens}: expected at least 1")
        if (where := self.optimizer_device) not in (known := flat_buffer.OPTIMIZER_DEVICES):
            raise ValueError(f"optimizer_device={where!r}: expected one of {', '.join(known)}")

    def check(self, decoder: Decoder, block: range, optimizer: str) -> None:
        """Errors for what this model cannot do; `dispatch.Unavailable` for an impl, or CUDA graphs, that cannot run."""
        for operation in ("linear_loss", optimizer):
            resolve(operation, self.impl, decoder.device)
        if self.cuda_graphs and decoder.way.name != "packed":
            raise ValueError(
                f"cuda_graphs=True: {decoder.name} runs {decoder.way.name}, and only packed samples go into graphs: "
                "leave it out"
            )
        if self.cuda_graphs and decoder.streamed:
            raise ValueError("cuda_graphs=True: a streamed model's layers have no place of their own: leave it out")
        check_cuda_graphs(self.cuda_graphs, decoder.device)
        check_cover(decoder, block, self.cover_precision)
