"""`statistic`, `rule` and `threshold` of a run: which blocks it trains, and what is refused before it begins."""

import dataclasses
import re

import pytest
import torch
from tiny_models import random_samples, tiny_model

import kunbr_fast as kf
from kunbr_fast.density.measure import STATISTICS
from kunbr_fast.planning.plan import plan

FORGET, RETAIN = random_samples(5, seed=1, low=6), random_samples(4, seed=2, low=6)
SETTINGS = dict(batch_size=5, warmup_epochs=1, warmup_lr=1e-4, block_lr=1e-4, block_epochs=1, num_blocks=3)
SETTINGS |= dict(skip_last_layers=0, rtt=False, max_retain_loss=1e9)


def config(**settings):
    return kf.KUnBRConfig(**SETTINGS | settings)


def unlearn(settings, model=None, **options):
    return kf.unlearn(model or tiny_model(), FORGET, RETAIN, settings, progress=False, **options)


def measured(statistic, **settings):
    return kf.knowledge_density(tiny_model(), FORGET, statistic=statistic, **settings)


@pytest.mark.parametrize("statistic", ["grad_linf", "fisher_ratio", "slug"])
def test_the_blocks_are_those_of_the_statistic(statistic):
    truth = measured(statistic, retain=RETAIN if statistic in ("fisher_ratio", "slug") else None)
    report = unlearn(config(statistic=statistic, top_k=1))
    torch.testing.assert_close(report.density.per_layer, truth.per_layer)
    assert report.blocks == kf.select_blocks(truth, 3, 1, 0) and report.density.statistic == statistic
    assert report.density.reduction == truth.reduction == report.config["reduction"]


def test_the_front_and_a_threshold_say_how_many_blocks():
    slug = measured("slug", retain=RETAIN)
    front = kf.select_blocks(slug, 6, skip_last_layers=0, rule="pareto")
    assert 1 < len(front) != 6
    report = unlearn(config(statistic="slug", rule="pareto", num_blocks=6))
    assert report.blocks == front == [range(start, stop) for start, stop in report.to_dict()["blocks"]]
    low, *_, high = sorted(float(measured("grad_l1").per_layer[i : i + 2].sum()) for i in (0, 2, 4))
    assert len(unlearn(config(rule="threshold", threshold=low)).blocks) == 2
    assert len(unlearn(config(rule="threshold", threshold=0.99 * low, rounds=2)).losses) == 1 + 2 * 3


def test_a_threshold_above_all_is_known_before_the_warm_up_and_resumed_with_a_lower_one(tmp_path):
    model, said = tiny_model(), []
    with pytest.raises(
        ValueError, match=r"threshold=1000000000000.0: no block is above it, the highest has .*: lower it"
    ):
        unlearn(config(rule="threshold", threshold=1e12), model, output_dir=tmp_path, on_stage=said.append)
    assert not [text for text in said if "warm-up" in text]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_model().parameters()))
    lower = config(rule="threshold", threshold=0.0)
    again = unlearn(lower, model, output_dir=tmp_path, resume=True)
    assert len(again.blocks) == 3 and again.losses == unlearn(lower).losses


def test_without_blocks_to_choose_from_nothing_begins():
    message = "num_blocks=3: each of the 3 blocks of 6 layers holds one of the last 6 layers"
    with pytest.raises(ValueError, match=message):
        unlearn(config(rule="threshold", threshold=1.0, skip_last_layers=6))
    with pytest.raises(ValueError, match='statistic="cosine" says how alike two gradients are.*measure "slug"'):
        unlearn(config(statistic="cosine", top_k=1))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(statistic="l1"), f"statistic='l1': expected one of {', '.join(STATISTICS)}"),
        (
            dict(statistic="slug", reduction="sample"),
            "reduction='sample': slug is of the mean gradient; leave",
        ),
        (dict(rule="dense"), "rule='dense': expected one of top_k, threshold, pareto"),
        (dict(rule="threshold"), "threshold=None, rule='threshold': give threshold too"),
        (dict(threshold=1.0), "threshold=1.0, rule='top_k': take rule='threshold', or leave it out"),
        (dict(rule="threshold", threshold=-1), "threshold=-1: expected a number of at least 0"),
        (dict(rule="pareto"), "rule='pareto', statistic='grad_l1': the front is of slug's"),
        (dict(rule="pareto", statistic="slug", top_k=3), "top_k=3, rule='pareto': the density says how many"),
        (dict(rule="pareto", statistic="slug", rounds=200), "rounds=200, num_blocks=8: expected at most 999 visits"),
    ],
)
def test_what_does_not_go_together(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        kf.KUnBRConfig(**settings)


def test_a_statistic_has_its_own_reduction_and_run_yaml_is_read_back(tmp_path):
    made = kf.KUnBRConfig.from_dict({"method": "robust_blocks", "statistic": "slug", "rule": "pareto"})
    assert (made.reduction, made.rule, made.top_k, kf.KUnBRConfig().reduction) == ("mean", "pareto", 6, "sample")
    made.save(tmp_path / "run.yaml")
    assert kf.KUnBRConfig.load(tmp_path / "run.yaml") == made


def test_a_resumed_run_has_the_same_statistic_and_an_earlier_version_s_record_the_usual_one(tmp_path):
    before = {k: v for k, v in config().to_dict().items() if k not in ("statistic", "rule", "threshold")}
    assert config().changed(before) == {} and config(statistic="fisher").changed(before) == {"statistic": "density"}

    begun = dict(rule="threshold", threshold=0.0)

    class Enough(Exception):
        pass

    def enough(text):
        if text.startswith("blocks: "):
            raise Enough

    with pytest.raises(Enough):
        unlearn(config(**begun), output_dir=tmp_path, on_stage=enough)
    for name, changed in {
        "statistic": begun | {"statistic": "fisher"},
        "threshold": begun | {"threshold": 1.0},
    }.items():
        with pytest.raises(ValueError, match=f"{name} was .* in the run to be resumed, and its results depend on it"):
            unlearn(config(**changed), output_dir=tmp_path, resume=True)
    assert len(unlearn(config(**begun), output_dir=tmp_path, resume=True).blocks) == 3


def test_a_plan_counts_the_retain_set_s_gradients_and_all_blocks_that_may_be_chosen(tmp_path):
    tiny_model().config.save_pretrained(tmp_path)

    def stages(**settings):
        found = plan(tmp_path / "config.json", "8GiB", config=dataclasses.replace(config(num_blocks=6), **settings))
        return {stage.name: stage for stage in found.stages}, found

    usual, _ = stages(top_k=2)
    slug, found = stages(statistic="slug", reduction=None, rule="pareto")
    assert 1.5 < slug["density"].flops / usual["density"].flops < 2.5
    assert slug["density"].memory["gradient"] > usual["density"].memory["gradient"]
    assert sum(s.runs for s in usual.values() if s.of_block) == pytest.approx(2)
    assert sum(s.runs for s in slug.values() if s.of_block) == pytest.approx(6)
    assert any("how many pareto chooses" in text for text in found.assumed)
    baseline, found = stages(top_k=0)
    assert not any(stage.of_block for stage in baseline.values())
    assert {each["settings"]["optimizer_device"] for each in found.tried} == {"device"}
