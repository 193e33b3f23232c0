"""kunbr-fast plan of a streamed run: what crosses the bus is what is counted, and the goals for large models hold."""

import json

import pytest
import torch
import transformers as tf
from tiny_models import random_samples

from kunbr_fast import KUnBRConfig, PrefixCache, knowledge_density, reinserted
from kunbr_fast.cli import command as cli
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.streaming import open_streamed
from kunbr_fast.model.weights import weights_of
from kunbr_fast.planning.context import Taken
from kunbr_fast.planning.costs import Architecture
from kunbr_fast.planning.layer_major import Traffic, update_traffic
from kunbr_fast.planning.lengths import Data
from kunbr_fast.planning.machines import Setup, Work
from kunbr_fast.planning.plan import plan
from kunbr_fast.planning.predict import Run

LLAMA = dict(model_type="llama", vocab_size=128256, num_key_value_heads=8, torch_dtype="bfloat16")
L8 = LLAMA | dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32)
L70 = LLAMA | dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
TINY = dict(
    vocab_size=199, hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
SAMPLES = random_samples(12, vocab=199)


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """Paths of config.json, by name."""
    found = {name: tmp_path_factory.mktemp(name) / "config.json" for name in ("8B", "70B")}
    for path, values in zip(found.values(), (L8, L70)):
        path.write_text(json.dumps(values))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of eight layers."""
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**TINY)).save_pretrained(path)
    return path


def tiny_run(**settings):
    """Of six forget and six retain samples, two steps of all."""
    sizes = [(len(s["input_ids"]), int((s["labels"][1:] != -100).sum())) for s in SAMPLES]
    config = KUnBRConfig(batch_size=3, warmup_epochs=1, block_epochs=1, num_blocks=4, top_k=1, **settings)
    data = Data(sizes[:6], sizes[6:], [], [n for n, _ in sizes])
    return Run(Architecture.of(tf.LlamaConfig(**TINY), "llama", "float32"), data, config, Setup("cpu", stream=True))


def opened(folder):
    """A streamed model's decoder, with counts from here on."""
    decoder = Decoder(open_streamed(folder))
    weights_of(decoder.model).loads.clear()
    return decoder, weights_of(decoder.model).loads


# ---------------------------------------------------------------- predicted, and counted


@pytest.mark.parametrize("block", [range(0, 2), range(3, 5), range(5, 7), range(6, 8)])
def test_layers_that_a_blocks_steps_load(folder, block):
    run = tiny_run()
    decoder, counted = opened(folder)
    cache = PrefixCache(decoder, SAMPLES, "host")
    cache.advance(block.start)
    assert counted.total() == block.start
    counted.clear()
    with reinserted(decoder, weights_of(open_streamed(folder)), block, 1e-3) as training:
        for _ in range(2):
            training.step_packed(training.criterion.step_batch(cache.batch(range(6)), 3))
        predicted = run.block(block).traffic.weights_in / run.layer
        assert predicted == counted.total() + min(block.start, len(block))


def test_layers_that_density_loads(folder):
    decoder, counted = opened(folder)
    knowledge_density(decoder, SAMPLES[:6])
    assert tiny_run().density().traffic == Traffic(weights_in=counted.total() * tiny_run().layer)


def test_resident_layers_have_no_traffic():
    some, all_of_them = tiny_run(resident_layers=3), tiny_run(resident_layers=8)
    steps, layer = 2, some.layer
    warm_up = some.warm_up()
    assert warm_up.traffic == update_traffic(5, layer, layer, steps)  # fp32, Lion: as many bytes of state
    assert warm_up.traffic == Traffic(2 * 9 * layer, 2 * 5 * layer, 5 * layer, 2 * 5 * layer)
    assert warm_up.memory["resident"] == 3 * 2 * layer and warm_up.store == 5 * 2 * layer
    for run, reads in ((some, 5), (all_of_them, 0)):
        assert run.evaluation(1).traffic == Traffic(weights_in=reads * layer)
    assert all_of_them.warm_up().traffic.total == 0 and all_of_them.warm_up().memory["layer buffers"] == 0


def test_what_finds_no_room_in_main_memory_goes_through_the_disk():
    run = tiny_run(cache="host")
    run.room = 4 * 2 * run.layer  # of eight layers' weights and state
    taken = run.warm_up()
    assert taken.work[0].disk == pytest.approx(taken.traffic.total / 2 + 8 * run.layer)
    stages = [
        run.stage("", Taken({}, [Work(**{name: 1e15})])) for name in ("flops", "memory", "bus_in", "disk", "host")
    ]
    assert [stage.bound for stage in stages] == ["arithmetic", "memory", "bus", "disk", "host"]


# ---------------------------------------------------------------- goals


@pytest.mark.parametrize("memory", ["32GiB", "64GiB"])
def test_llama_3_8b_on_24_gib(configs, memory):
    found = plan(configs["8B"], "24GiB", gpu="4090", stream=True, memory=memory, disk_rate=3)
    attack = [stage for stage in found.stages if stage.name == "RTT attack"]
    assert [stage.name for stage in found.stages][:3] == ["evaluation", "warm-up", "density"] and len(attack) == 1
    assert found.seconds - sum(stage.runs * stage.seconds for stage in attack) < 90 * 60
    assert max(stage.peak for stage in found.stages) + found.best.run.setup.reserve <= 24 << 30
    assert found.host + (4 << 30) <= found.best.run.setup.memory
    assert found.best.files == 0 if memory == "64GiB" else found.best.stream_cache < 28 << 30
    evaluation = found.stages[0]
    streamed = 32 - found.settings["resident_layers"]
    assert evaluation.traffic.total == streamed * found.best.run.layer  # each layer once for all questions


def test_llama_3_70b_on_one_gpu(configs):
    with pytest.raises(ValueError, match=r"re-insertion 0-9 of 70.55 billion.*--stream"):
        plan(configs["70B"], "80GB", unlearned=True, config=KUnBRConfig(rtt=False))
    found = plan(configs["70B"], "80GB", stream=True, memory="256GiB")
    assert found.best.fits and found.settings["optimizer_device"] == "host"  # blocks of 10 layers
    block = next(stage for stage in found.stages if stage.name == "re-insertion 10-19")
    above, steps = 80 - max(20, found.settings["resident_layers"]), 3 * -(-785 // 6)
    assert block.traffic.total == pytest.approx(steps * 2 * (above - 2) * found.best.run.layer, rel=0.01)
    less = plan(configs["70B"], "80GB", stream=True, memory="256GiB", unlearned=True, config=KUnBRConfig(rtt=False))
    assert "warm-up" not in [stage.name for stage in less.stages] and less.seconds < found.seconds
    with pytest.raises(ValueError, match=r"GiB of main memory at least, and there are 8.00 \(--memory\)"):
        plan(configs["70B"], "80GB", stream=True, memory="8GiB")


def test_a_cover_in_low_precision_is_named_and_not_chosen(configs):
    found = plan(configs["8B"], "24GiB", gpu="4090", stream=True, config=KUnBRConfig(rtt=False))
    assert found.config.cover_precision == "none"
    assert [each.settings["cover_precision"] for each in found.approximations] == ["int8", "nf4"]
    assert "another result, so not chosen: " in found.table()
    block, nf4 = (
        next(s for s in stages if s.name == "re-insertion 0-3")
        for stages in (found.stages, found.approximations[1].stages)
    )
    assert nf4.memory["cover"] == pytest.approx(28 * 218e6 * 0.5625, rel=0.05)
    assert nf4.traffic.total < block.traffic.total / 50


def test_gpus_that_divide_the_weights(configs):
    alone = dict(gpu="4090", config=KUnBRConfig(rtt=False))
    with pytest.raises(ValueError, match=r"warm-up of 8.03 billion.*3 such GPUs \(--gpus 3\), .*\(sharding: fsdp\)"):
        plan(configs["8B"], "24GiB", **alone)
    found = plan(configs["8B"], "24GiB", gpus=4, **alone)
    assert found.settings["sharding"] == "fsdp"
    (warm_up,) = (stage for stage in found.stages if stage.name == "warm-up")
    assert warm_up.memory["weights"] < 6 << 30 and warm_up.bound == "link"  # PCIe between them
    assert plan(configs["8B"], "80GiB", gpus=2, config=KUnBRConfig(rtt=False)).settings["sharding"] == "none"


def test_the_command(configs, capsys, tmp_path):
    common = ["plan", "--model", str(configs["8B"]), "--gpu-memory", "24GiB", "--gpu", "4090", "--stream"]
    status = cli.main([*common, "--memory", "32GiB", "--disk-rate", "1", "--out", str(tmp_path / "run.yaml")])
    out = capsys.readouterr().out
    assert status == 0 and "bound by" in out and "without the attack; main memory" in out
    assert "unlearn with: --stream --stream-cache" in out and "a disk at 1 GB/s" in out
    assert KUnBRConfig.load(tmp_path / "run.yaml").resident_layers > 0
