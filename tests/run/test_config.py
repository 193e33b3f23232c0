"""The settings: types, limits, YAML, and names that do not exist."""

import dataclasses
import math

import pytest

from kunbr_fast.evaluation.attacks import ATTACKS
from kunbr_fast.run.config import KUnBRConfig


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_round_trip(tmp_path):
    config = KUnBRConfig(
        target="letter",
        seed=2**32 - 1,
        retain_coeff=0.1,
        forget_loss_cap=1e-5,
        rtt_lrs=(3e-7, 1 / 3),
        max_length=17,
        master_weights="stochastic",
        warmup_lr=1e-30,
    )
    config.save(tmp_path / "run.yaml")
    assert KUnBRConfig.load(tmp_path / "run.yaml") == config
    assert KUnBRConfig.from_dict(config.to_dict()) == config
    KUnBRConfig().save(tmp_path / "default.yaml")
    assert KUnBRConfig.load(tmp_path / "default.yaml") == KUnBRConfig()


def test_every_field_survives_yaml_with_its_type(tmp_path):
    KUnBRConfig().save(tmp_path / "run.yaml")
    loaded = KUnBRConfig.load(tmp_path / "run.yaml")
    for field in dataclasses.fields(KUnBRConfig):
        assert type(getattr(loaded, field.name)) is type(getattr(KUnBRConfig(), field.name)), field.name
        assert field.metadata["help"] and field.metadata["stage"]


def test_yaml_numbers(tmp_path):
    config = KUnBRConfig.load(
        write(tmp_path, "warmup_lr: 1e-5\nblock_lr: 2\nrtt_lrs: [1e-5, 2.0e-6, 1]\nforget_loss_cap: 10\n")
    )
    assert config.warmup_lr == 1e-5 and config.rtt_lrs == (1e-5, 2e-6, 1.0)
    for value in (config.warmup_lr, config.block_lr, config.forget_loss_cap, *config.rtt_lrs):
        assert type(value) is float
    assert KUnBRConfig.load(write(tmp_path, "rtt_lrs: 3.0e-6")).rtt_lrs == (3e-6,)
    assert KUnBRConfig.load(write(tmp_path, "rtt_attacks: lora")).rtt_attacks == ("lora",)
    assert KUnBRConfig.load(write(tmp_path, "rtt_attacks: all")).rtt_attacks == tuple(ATTACKS)
    assert KUnBRConfig.load(write(tmp_path, "")) == KUnBRConfig()
    assert KUnBRConfig.load(write(tmp_path, "max_length: null")).max_length is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("activations: file", "activations is no longer a setting: cache also says where"),
        ("cover_precision: fp8_matmul", "cover_precision=fp8_matmul is no longer a setting: its gradients"),
        ("retain_coef: 2", "unknown setting 'retain_coef': did you mean 'retain_coeff'?"),
        ("Target: all", "unknown setting 'Target': did you mean 'target'?"),
        ("lr: 1", "unknown setting 'lr': take warmup_lr (of all parameters), or block_lr"),
        ("preset: tofu", "unknown setting 'preset': --preset is an option of the command line, no setting"),
        ("zzzzzz: 1", "known are target, max_length"),
        ("3: 1", "the key '3' is read as int"),
        ("- target", "got ['target'], expected lines of 'setting: value'"),
        ("hello", "got 'hello'"),
        ("a: [", "not YAML"),
        ("batch_size: true", "batch_size=True: expected a whole number from 1 to 65536"),
        ("batch_size: 2.0", "batch_size=2.0: expected a whole number"),
        ("batch_size: '2'", "batch_size='2': expected a whole number"),
        ("batch_size: null", "batch_size=None: expected a whole number"),
        ("batch_size: 0", "batch_size=0: expected a whole number from 1"),
        ("retain_batch_size: 0", "retain_batch_size=0: expected a whole number from 1 to 65536 or null"),
        ("max_length: 3.5", "max_length=3.5: expected a whole number from 1 to 2147483647 or null"),
        ("rtt: 1", "rtt=1: expected bool"),
        ("rtt: 'false'", "rtt='false': expected bool"),
        ("master_weights: 0", "master_weights=0: expected str"),
        ("master_weights: bf16", "master_weights='bf16': expected one of fp32, none, stochastic"),
        (
            "master_weights: true",
            "master_weights=True is no longer a setting: expected fp32, none or stochastic: take fp32",
        ),
        ("rtt_lora_rank: 4", "rtt_lora_rank=4: the attack lora is not among rtt_attacks (full): leave it out"),
        (
            "rtt_attacks: [lora, nf4]\nrtt_master_weights: fp32",
            "rtt_master_weights='fp32': an attack on all weights, such as full, is not among rtt_attacks (lora, nf4)",
        ),
        ("warmup_master_weights: fp16", "warmup_master_weights='fp16': expected one of fp32, none, stochastic"),
        ("warmup_lr: true", "warmup_lr=True: expected a number of at least 0"),
        ("warmup_lr: fast", "warmup_lr='fast': expected a number of at least 0"),
        ("warmup_lr: [1]", "warmup_lr=[1]: expected a number of at least 0"),
        ("warmup_lr: -1e-5", "warmup_lr=-1e-05: expected a number of at least 0"),
        ("warmup_lr: .nan", "warmup_lr: .nan is not a finite number"),
        ("block_lr: .inf", "block_lr: .inf is not a finite number"),
        ("retain_coeff: 'inf'", "retain_coeff='inf': expected a number of at least 0"),
        ("retain_coeff: -1", "retain_coeff=-1: expected a number of at least 0"),
        ("forget_loss_cap: .nan", "forget_loss_cap: .nan is not a finite number"),
        ("forget_loss_cap: 0", "forget_loss_cap=0: expected a number above 0"),
        ("forget_loss_cap: -4", "forget_loss_cap=-4: expected a number above 0"),
        ("max_retain_loss: 0", "max_retain_loss=0: expected a number above 0"),
        ("target: 3", "target=3: expected str"),
        ("target: letters", "target='letters': expected one of all, answer, letter, number"),
        ("optimizer: sgd", "optimizer='sgd': expected one of lion, adamw"),
        ("insertion: both", "insertion='both': expected one of independent, cumulative"),
        ("impl: gpu", "impl='gpu': expected one of auto, cuda, triton, torch"),
        ("rtt_lrs: []", "rtt_lrs=(): expected one or more different"),
        ("rtt_lrs: [0]", "rtt_lrs entry=0: expected a number above 0"),
        ("rtt_lrs: [1e-5, 0.00001]", "rtt_lrs=(1e-05, 1e-05): expected one or more different"),
        ("rtt_lrs: [.nan]", ".nan is not a finite number"),
        ("rtt_lrs: [1e-5, .nan]", ".nan is not a finite number"),
        ("rtt_lrs: [true]", "rtt_lrs entry=True: expected a number above 0"),
        ("rtt_lrs: true", "rtt_lrs entry=True: expected a number above 0"),
        ("rtt_lrs: fast", "rtt_lrs entry='fast'"),
        ("rtt_attacks: fast", "rtt_attacks='fast': expected some of full, wide"),
        ("rtt_attacks: [full, full]", "rtt_attacks=('full', 'full'): expected one or more different"),
    ],
)
def test_refusals_name_the_file_and_the_setting(text, message, tmp_path):
    path = write(tmp_path, text)
    with pytest.raises(ValueError) as error:
        KUnBRConfig.load(path)
    assert str(error.value).startswith(f"{path}:") and message in str(error.value)


def test_an_old_file_is_read(tmp_path):
    """Earlier versions wrote `activations: auto` into every one; it changes nothing."""
    assert KUnBRConfig.load(write(tmp_path, "activations: auto\nseed: 3")) == KUnBRConfig(seed=3)


def test_old_settings_as_keywords_name_the_new_way():
    with pytest.raises(ValueError, match="^activations is no longer a setting: cache also says where"):
        KUnBRConfig(activations="file")
    with pytest.raises(ValueError, match="expected fp32, none or stochastic: take none, which it was"):
        KUnBRConfig(master_weights=False)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        KUnBRConfig(nonsense=1)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="none.yaml: no such file"):
        KUnBRConfig.load(tmp_path / "none.yaml")
    path = tmp_path / "run.yaml"
    path.write_bytes("target: é".encode("latin-1"))
    with pytest.raises(ValueError, match="run.yaml: not UTF-8"):
        KUnBRConfig.load(path)


def test_changed_tells_which_stage():
    before = KUnBRConfig()
    assert before.changed(KUnBRConfig().to_dict()) == {}
    after = dataclasses.replace(before, block_lr=1e-3, seed=4, rtt_epochs=9, cache="file", rtt_lrs=(1e-3,))
    assert after.changed(before.to_dict()) == {"block_lr": "blocks", "seed": "data", "rtt_epochs": "rtt"}
    stages = {field.metadata["stage"] for field in dataclasses.fields(KUnBRConfig)}
    assert stages == {"data", "training", "warmup", "density", "selection", "blocks", "evaluation", "rtt", "none"}


def test_retain_size():
    assert KUnBRConfig(batch_size=5).retain_size == 5
    assert KUnBRConfig(batch_size=5, retain_batch_size=2).retain_size == 2
    assert math.isclose(KUnBRConfig(retain_coeff=0).retain_coeff, 0.0)
