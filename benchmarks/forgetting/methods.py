"""The methods that are compared, and the settings that are tried of each: as many for every one.

A setting is what it changes of the world's `KUnBRConfig`. Learning rates are multiples of the world's usual ones. Of
each method the first entries vary its rate, the last ones its structure. All make the same number of updates.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

import kunbr_fast as kf
from kunbr_fast.benchmarks.forgetting.worlds import World
from kunbr_fast.data.schedule import Schedule
from kunbr_fast.density.measure import knowledge_density
from kunbr_fast.density.select import select_blocks
from kunbr_fast.model.blocks import partition
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.reporter import Reporter

Setting = dict[str, Any]
Train = Callable[[World, KUnBRConfig, Path, Reporter, Callable[[nn.Module], None]], None]


@dataclasses.dataclass(frozen=True)
class Method:
    """title: in tables. settings: those that are tried, in a world. train: makes the model forget and hands it to its
    last argument. searched: whether a setting is chosen. wide: attacked in every way, not only in the rehearsed one.
    """

    title: str
    settings: Callable[[World], list[Setting]] = lambda world: [{}]
    train: Train | None = None
    wide: bool = False

    @property
    def searched(self) -> bool:
        return self is not METHODS[YARDSTICK]


# ---------------------------------------------------------------- how they train


def by_package(
    world: World, config: KUnBRConfig, folder: Path, reporter: Reporter, keep: Callable[[nn.Module], None]
) -> None:
    """`kf.unlearn`; goes on where it was."""
    forget, retain = world.data(config)
    model, out = world.model(), folder / "run"
    resume = (out / "kunbr-checkpoints").is_dir()
    kf.unlearn(
        model, forget, retain, config, tokenizer=world.tokenizer, output_dir=out, resume=resume, reporter=reporter
    )
    keep(model)


def by_hand(
    world: World,
    config: KUnBRConfig,
    folder: Path,
    reporter: Reporter,
    keep: Callable[[nn.Module], None],
    *,
    choose: Callable[[list[range], KUnBRConfig, int], list[range]] = lambda blocks, config, layers: blocks,
    inside: bool = False,
) -> None:
    """KUnBR with other blocks than the densest (`choose`), or trained inside M_u, not inside M_0."""
    model = world.model()
    unlearned = copy.deepcopy(model)
    warm_up = dataclasses.replace(config, top_k=0)
    kf.unlearn(unlearned, *world.data(config), warm_up, tokenizer=world.tokenizer, reporter=reporter)
    forget, retain = world.samples("forget"), world.samples("retain")
    found = knowledge_density(model, forget, modules=config.modules, reduction=config.reduction)
    densest = select_blocks(found, config.num_blocks, config.top_k, config.skip_last_layers)
    for number, block in enumerate(choose(densest, config, len(found.per_layer)), start=1):
        seed = config.seed * 1000 + number
        order = Schedule(len(forget), len(retain), config.batch_size, config.retain_size, config.block_epochs, seed)
        cover = copy.deepcopy(unlearned) if inside else model
        how = dict(criterion=config.criterion(block), settings=config.block_settings(seed))
        with reporter.stage("blocks"), kf.reinserted(cover, unlearned, block, **how) as training:
            for f, r in order:
                training.step([forget[i] for i in f], [retain[i] for i in r])
    keep(unlearned)


def others(blocks: list[range], config: KUnBRConfig, layers: int) -> list[range]:
    """As many blocks as the densest are, drawn by the seed among all sets of blocks but that of the densest."""
    known, rng = partition(layers, config.num_blocks), random.Random(config.seed)
    while True:
        drawn = sorted(rng.sample(known, len(blocks)), key=lambda block: block.start)
        if drawn != sorted(blocks, key=lambda block: block.start):
            return drawn


def random_blocks(*arguments: Any) -> None:
    by_hand(*arguments, choose=others)


def inside_the_unlearned(*arguments: Any) -> None:
    by_hand(*arguments, inside=True)


def without_them(
    world: World, config: KUnBRConfig, folder: Path, reporter: Reporter, keep: Callable[[nn.Module], None]
) -> None:
    with reporter.stage("teaching"):
        model = world.model(("retain", "bystanders"))
    keep(model)


# ---------------------------------------------------------------- what is tried of each


def whole(world: World, objective: str, factors: list[float], *more: Setting, **same: Any) -> list[Setting]:
    """All parameters by one objective and Lion, at multiples of the world's rate, then what `more` changes at it."""
    base = dict(top_k=0, warmup_epochs=world.epochs, objective=objective, warmup_lr=world.lion, **same)
    if objective not in ("gradient_difference", "ga"):
        base["forget_loss_cap"] = None
    rates = [{**base, "warmup_lr": world.lion * factor} for factor in factors]
    return rates + [{**base, **changes} for changes in more]


def adamw(world: World) -> Setting:
    return dict(warmup_optimizer="adamw", warmup_lr=world.adamw)


def rmu(world: World) -> list[Setting]:
    """At the middle layer, or at three quarters of the depth."""
    middle, upper = world.layers // 2, world.layers * 3 // 4
    at = {"layer": middle, "steering_coeff": 20.0}
    return whole(
        world,
        "rmu",
        [1.0, 2.0],
        dict(warmup_lr=2 * world.lion, retain_coeff=1.0),
        dict(warmup_lr=2 * world.lion, objective_options={**at, "steering_coeff": 60.0}),
        dict(warmup_lr=2 * world.lion, objective_options={**at, "layer": upper}),
        objective_options=at,
    )


def blocks(insertion: str) -> Callable[[World], list[Setting]]:
    """A short warm-up, then the densest blocks, as published (independent) or staying in place."""

    def settings(world: World) -> list[Setting]:
        lion = dict(insertion=insertion, optimizer="lion")
        return [
            dict(insertion=insertion, optimizer="adamw", block_lr=world.block_adamw * 0.4),
            dict(insertion=insertion, optimizer="adamw", block_lr=world.block_adamw),
            dict(lion, block_lr=world.lion * 2),
            dict(lion, block_lr=world.lion * 4),
            dict(lion, block_lr=world.lion * 2, **world.finer),
        ]

    return settings


def adversary(world: World) -> Setting:
    rates = world.config.rtt_lrs
    return dict(adversary_every=9, adversary_steps=2, adversary_lrs=rates, retain_loss="hidden_layers")


def robust(world: World) -> list[Setting]:
    """An adversary that relearns, and hidden states kept: of all layers, of the last one, of the upper half."""
    layers, lr = world.layers, 1.5 * world.lion
    return whole(
        world,
        "gradient_difference",
        [2.0],
        dict(warmup_lr=2 * world.lion, hidden_coeff=40.0),
        dict(warmup_lr=lr, hidden_coeff=2.5, retain_layers=(layers - 1,)),
        dict(warmup_lr=lr, hidden_coeff=5.0, retain_layers=(layers - 1,)),
        dict(warmup_lr=lr, hidden_coeff=2.5, retain_layers=tuple(range(layers // 2, layers))),
        hidden_coeff=10.0,
        **adversary(world),
    )


def robust_blocks(world: World) -> list[Setting]:
    """The same in re-insertion: a robust warm-up, then the lower half as a block, under an adversary of the whole model
    or of the block; both halves; all layers as one block."""
    layers, epochs = world.layers, world.epochs
    same = dict(optimizer="lion", hidden_coeff=2.5, retain_layers=tuple(range(layers // 2, layers)), **adversary(world))
    same |= dict(num_blocks=2, insertion="cumulative", warmup_lr=2 * world.lion, adversary_reach="model")

    def lower(blocks_from: int, **more: Any) -> Setting:
        found = dict(same, top_k=1, warmup_epochs=blocks_from, block_epochs=epochs - blocks_from)
        return dict(found, block_lr=2.5 * world.lion, block_hidden_coeff=0.5, **more)

    begin = 1 if epochs % 2 else 2
    halves = dict(top_k=2, skip_last_layers=0, warmup_epochs=begin, block_epochs=(epochs - begin) // 2)
    one = dict(num_blocks=1, top_k=1, skip_last_layers=0, warmup_epochs=0, block_epochs=epochs)
    return [
        lower(epochs * 2 // 3),
        dict(lower(epochs * 2 // 3), adversary_reach="block"),
        lower(epochs // 3),
        dict(same, **halves, block_lr=5 * world.lion, block_hidden_coeff=1.0),
        dict(same, **one, block_lr=1.5 * world.lion, retain_layers=(layers - 1,)),
    ]


YARDSTICK, BASELINE = "never", "gradient_difference"
METHODS: dict[str, Method] = {
    "gradient_ascent": Method(
        "gradient ascent",
        lambda w: whole(w, "ga", [0.05, 0.1, 0.25, 0.5], adamw(w), max_retain_loss=1e9),
    ),
    BASELINE: Method(
        "gradient difference",
        lambda w: whole(w, BASELINE, [0.75, 1.0, 1.25, 1.5], adamw(w)),
        wide=True,
    ),
    "npo": Method("NPO", lambda w: whole(w, "npo", [0.75, 1.0, 1.5, 2.5], {"objective_options": {"beta": 0.5}})),
    "simnpo": Method(
        "SimNPO",
        lambda w: whole(
            w, "simnpo", [0.5, 0.75, 1.0], {"objective_options": {"delta": 0.0}},
            {"objective_options": {"beta": 1.0}}, objective_options={"delta": 4.0},
        ),
    ),
    "rmu": Method("RMU", rmu),
    "ria": Method("wrong answers (RIA)", lambda w: whole(w, "ria", [0.5, 1.0, 1.5, 2.5], adamw(w))),
    "kunbr": Method("KUnBR, as published", blocks("independent"), wide=True),
    "kunbr_cumulative": Method("KUnBR, cumulative", blocks("cumulative"), wide=True),
    "random_blocks": Method("KUnBR, random blocks", blocks("independent"), random_blocks),
    "no_reinsertion": Method("KUnBR, no re-insertion", blocks("independent"), inside_the_unlearned),
    "robust": Method("robust, whole model", robust, wide=True),
    "robust_blocks": Method("robust, blocks", robust_blocks, wide=True),
    YARDSTICK: Method("never saw them", train=without_them, wide=True),
}  # fmt: skip


def training_of(method: Method) -> Train:
    return method.train or by_package
