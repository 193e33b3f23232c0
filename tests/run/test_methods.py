"""Methods by name, and runs without blocks."""

import argparse

import pytest
import torch
from tiny_models import random_samples, tiny_model

import kunbr_fast as kf
from kunbr_fast.cli.arguments import add_settings
from kunbr_fast.cli.inputs import read_config
from kunbr_fast.run.methods import methods
from kunbr_fast.run.output import finished_report, write_reports

FORGET, RETAIN = random_samples(6, seed=1, low=6), random_samples(5, seed=2, low=6)
SMALL = dict(batch_size=3, warmup_epochs=2, warmup_lr=1e-3)


def configured(*words):
    parser = argparse.ArgumentParser()
    add_settings(parser)
    parser.add_argument("--quiet", action="store_true")
    return read_config(parser.parse_args([*map(str, words), "--quiet"]))


def test_kunbr_is_what_is_published_which_is_the_default():
    assert configured("--method", "kunbr") == kf.KUnBRConfig() == kf.KUnBRConfig.from_dict({"method": "kunbr"})


@pytest.mark.parametrize("method", methods())
def test_each_sets_what_it_says_and_options_win(method):
    config, text = configured("--method", method, "--weight-decay", "0.5", "--batch-size", 3), methods()[method].text
    assert config.weight_decay == 0.5 and config.batch_size == 3 and text.isprintable()
    for name, value in methods()[method].settings.items():
        assert name == "rtt_attacks" or getattr(config, name) == value
    assert configured("--method", method, "--top-k", 1).top_k == 1
    assert not {name for name in methods()[method].settings if name.endswith("_lr")}


def test_a_file_names_a_method_and_its_lines_win(tmp_path):
    (path := tmp_path / "run.yaml").write_text("method: robust\nadversary_every: 5\n")
    config = configured("--config", path)
    assert (config.adversary_every, config.retain_layers, config.top_k) == (5, "upper", 0)
    config.save(tmp_path / "whole.yaml")
    assert configured("--config", tmp_path / "whole.yaml") == config
    assert configured("--config", path, "--method", "kunbr", "--adversary-every", 7).retain_loss == "nll"


def test_a_line_that_says_otherwise_than_the_method_is_an_error(tmp_path):
    (path := tmp_path / "run.yaml").write_text("top_k: 3\n")
    with pytest.raises(ValueError, match=r"run.yaml: top_k: 3, and --method robust sets 0.* --top-k too"):
        configured("--config", path, "--method", "robust")
    assert configured("--config", path, "--method", "robust", "--top-k", 2).top_k == 2
    path.write_text("method: robbust\n")
    with pytest.raises(ValueError, match="robbust.*did you mean 'robust'"):
        configured("--config", path)
    path.write_text("method: [robust]\n")
    with pytest.raises(ValueError, match="method= is no setting.*KUnBRConfig.from_dict"):
        kf.KUnBRConfig(method="npo")
    with pytest.raises(ValueError, match="run.yaml: method=.*expected one of kunbr, robust"):
        configured("--config", path)


@pytest.mark.parametrize("method", ["robust", "gradient_difference"])
def test_without_blocks_the_result_is_the_warm_up(method, tmp_path):
    settings = {"method": method, **SMALL} | ({"adversary_lrs": (1e-3,)} if method == "robust" else {})
    model, killed = tiny_model(), tiny_model()
    config = kf.KUnBRConfig.from_dict(settings)
    report = kf.unlearn(model, FORGET, RETAIN, config, progress=False)
    assert report.blocks == [] and list(report.losses) == ["warmup"] and len(report.losses["warmup"]) == 2
    start = dict(tiny_model().named_parameters())
    assert all(not torch.equal(value, start[name]) for name, value in model.named_parameters() if value.dim() > 1)

    class Enough(Exception):
        pass

    def enough(text):
        if text == "looking at the result":
            raise Enough

    with pytest.raises(Enough):
        kf.unlearn(killed, FORGET, RETAIN, config, output_dir=tmp_path, progress=False, on_stage=enough)
    again = tiny_model()
    kf.unlearn(again, FORGET, RETAIN, config, output_dir=tmp_path, progress=False, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="top_k=0, warmup_epochs=0: nothing would be trained"):
        kf.KUnBRConfig(top_k=0, warmup_epochs=0)
    with pytest.raises(ValueError, match="nothing would be trained"):
        kf.unlearn(tiny_model(), FORGET, RETAIN, kf.KUnBRConfig(top_k=0), unlearned=tiny_model(seed=1), progress=False)


def test_a_config_of_python_s_own_may_have_settings_of_blocks_and_its_report_is_written(tmp_path):
    said, config = [], kf.KUnBRConfig(top_k=0, warmup_epochs=1, block_lr=1e-3, rtt=False)
    report = kf.unlearn(tiny_model(), FORGET, RETAIN, config, progress=False, on_stage=said.append)
    assert "block_lr: no effect, no block is trained (top_k=0)" in said
    write_reports(tmp_path, report, "the original")
    assert finished_report(tmp_path)["config"]["block_lr"] == 1e-3
