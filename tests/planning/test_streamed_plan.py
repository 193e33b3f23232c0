"""kunbr-fast plan of a streamed run: what crosses the bus is what is counted, and the goals for large models hold."""

import dataclasses
import gc
import itertools
import json
from collections import Counter

import pytest
import tiny_text
import torch
import transformers as tf
from tiny_models import peak_bytes, random_samples

import kunbr_fast as kf
from kunbr_fast import KUnBRConfig, PrefixCache, knowledge_density, reinserted
from kunbr_fast.cli import command as cli
from kunbr_fast.data import load_records
from kunbr_fast.evaluation.accuracy import Questions, measure
from kunbr_fast.evaluation.rtt import Fold, rtt_attack
from kunbr_fast.files.models import load_tokenizer
from kunbr_fast.memory import Place
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.frozen import frozen
from kunbr_fast.model.streaming import open_streamed
from kunbr_fast.model.weights import weights_of
from kunbr_fast.planning.context import Taken
from kunbr_fast.planning.costs import Architecture
from kunbr_fast.planning.layer_major import Traffic
from kunbr_fast.planning.lengths import Data
from kunbr_fast.planning.machines import Setup, Work
from kunbr_fast.planning.plan import plan
from kunbr_fast.planning.predict import Run
from kunbr_fast.training.fine_tune import full_training

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


def sizes(samples):
    return [(len(s["input_ids"]), int((s["labels"][1:] != -100).sum())) for s in samples]


def tiny_run(dtype="float32", **settings):
    """Of six forget and six retain samples, two steps of all."""
    config = KUnBRConfig(batch_size=3, warmup_epochs=1, block_epochs=1, num_blocks=4, top_k=1, **settings)
    data = Data(sizes(SAMPLES)[:6], sizes(SAMPLES)[6:], [], [n for n, _ in sizes(SAMPLES)])
    return Run(Architecture.of(tf.LlamaConfig(**TINY), "llama", dtype), data, config, Setup("cpu", stream=True))


def opened(folder, resident=0, dtype=None):
    """A streamed model's decoder, and its stream, with counts from here on."""
    decoder = Decoder(open_streamed(folder, dtype=dtype, resident_layers=resident))
    stream = weights_of(decoder.model)
    stream.release()
    stream.loads.clear()
    stream.traffic.clear()
    return decoder, stream


# ---------------------------------------------------------------- predicted, and counted


@pytest.mark.parametrize("block", [range(0, 2), range(3, 5), range(5, 7), range(6, 8)])
def test_layers_that_a_blocks_steps_load(folder, block):
    run = tiny_run()
    decoder, stream = opened(folder)
    counted = stream.loads
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
    decoder, stream = opened(folder)
    knowledge_density(decoder, SAMPLES[:6])
    assert tiny_run().density().traffic == Traffic(**stream.traffic)


def wide(tmp_path, dtype="float32", tied=False, **settings):
    """(a wider model's plan, its samples); the model is in tmp_path."""
    config = tf.LlamaConfig(**TINY | dict(hidden_size=128, intermediate_size=344), tie_word_embeddings=tied)
    tf.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(tmp_path)
    data = random_samples(12, low=20, high=40, vocab=199)
    how = KUnBRConfig(batch_size=6, num_blocks=4, top_k=1, block_epochs=1, warmup_epochs=1, **settings)
    given, a = Data(sizes(data)[:6], sizes(data)[6:], [], []), Architecture.of(config, "llama", dtype)
    return Run(a, given, how, Setup("cpu", stream=True, unlearned=True)), data


@pytest.mark.parametrize("dtype, micro", [("float32", 100), ("bfloat16", None)])
def test_peak_of_a_streamed_block(dtype, micro, tmp_path):
    (run, data), block = wide(tmp_path, dtype, micro_batch_tokens=micro), range(2, 4)

    def measured():
        decoder, other = Decoder(open_streamed(tmp_path)), weights_of(open_streamed(tmp_path))
        cache = PrefixCache(decoder, data, "host")
        cache.advance(block.start)
        more = dict(impl="torch", micro_batch_tokens=micro, activations="host")
        with reinserted(decoder, other, block, 1e-3, **more) as training:
            for _ in range(2):
                training.step_packed(training.criterion.step_batch(cache.batch(range(12)), 6))

    gc.collect()
    assert run.stage("", run.block(block)).peak == pytest.approx(peak_bytes(measured), rel=0.1)


@pytest.mark.parametrize(
    "dtype, micro, resident, optimizer, tied",
    [("float32", None, 2, "adamw", False), ("float32", 100, 0, "lion", False), ("bfloat16", 100, 2, "lion", True)],
)
def test_peak_of_a_streamed_warm_up(dtype, micro, resident, optimizer, tied, tmp_path):
    """The allocator's log has the mapped files too, in which all layers that are not resident lie."""
    how = dict(micro_batch_tokens=micro, resident_layers=resident, warmup_optimizer=optimizer)
    run, data = wide(tmp_path, dtype, tied, **how)
    run.setup = dataclasses.replace(run.setup, unlearned=False)

    def measured():
        decoder = Decoder(open_streamed(tmp_path, resident_layers=resident, host_bytes=0))
        with decoder.weights.writable(tmp_path), frozen(decoder.model):
            more = dict(impl="torch", micro_batch_tokens=micro, place=Place("host"))
            training = full_training(decoder, lr=1e-4, optimizer=optimizer, **more)
            for _ in range(2):
                training.step(data[:6], data[6:])

    gc.collect()
    predicted = run.stage("", run.warm_up())
    assert predicted.peak + predicted.store == pytest.approx(peak_bytes(measured), rel=0.1)


@pytest.mark.parametrize(
    "resident, dtype, masters",
    [(0, "float32", "none"), (3, "float32", "none"), (8, "float32", "none")]
    + [(0, "bfloat16", "fp32"), (3, "bfloat16", "stochastic")],
)
def test_bytes_of_a_streamed_warm_up(folder, resident, dtype, masters, tmp_path):
    """Of a warm-up's steps, and of an evaluation, as `LayerStream.traffic` counts them."""
    run = tiny_run(dtype, resident_layers=resident, warmup_master_weights=masters)
    decoder, stream = opened(folder, resident, dtype)
    with stream.writable(tmp_path), frozen(decoder.model):
        training = full_training(decoder, settings=run.config.full_settings(), lr=1e-4)
        for _ in range(2):
            training.step_packed(training.criterion.pack(SAMPLES[:3], SAMPLES[6:9]))
        training.check()
    assert run.warm_up().traffic == Traffic(**{**dataclasses.asdict(Traffic()), **stream.traffic})
    stream.traffic.clear()
    asked, count = [[sample["input_ids"].tolist()] for sample in SAMPLES], len(SAMPLES)
    measure(decoder, Questions(asked, [[[]]] * count, [5, 6, 7, 8], [0] * count, [4] * count))
    assert run.evaluation(1).traffic == Traffic(**stream.traffic) == Traffic(weights_in=8 * run.layer)


def test_bytes_of_a_streamed_attack(tmp_path):
    """AdamW keeps a counter for each parameter too, which the plan leaves out."""
    root = tiny_text.workspace(tmp_path)
    tokenizer, files = load_tokenizer(root / "model"), [root / "f0.jsonl", root / "f1.jsonl"]
    config = KUnBRConfig(rtt_attacks=("full", "lora", "int8"), rtt_lrs=(1e-4,), rtt_epochs=2, rtt_batch_size=4)
    data = Data.load([str(path) for path in files], [str(root / "r.jsonl")], tokenizer, config)
    run = Run(Architecture.load(root / "model")[0], data, config, Setup("cpu", stream=True))
    decoder, stream = opened(root / "model")
    folds = [Fold(path.stem, *[load_records([str(path)])] * 2) for path in files]
    rtt_attack(decoder, tokenizer, folds, config.attack(), tmp_path, progress=False)
    predicted = dataclasses.asdict(run.attack().traffic.times(3))
    assert predicted == pytest.approx(dict(stream.traffic), rel=0.01)
    for name in ("weights_in", "weights_out"):
        assert predicted[name] == pytest.approx(stream.traffic[name])


def test_bytes_of_a_whole_streamed_run(tmp_path):
    """Each stage of a run, by what `LayerStream.traffic` has when the next one begins."""
    root = tiny_text.workspace(tmp_path)
    tokenizer, files = load_tokenizer(root / "model"), [root / "f0.jsonl", root / "f1.jsonl"]
    how = dict(num_blocks=3, top_k=1, skip_last_layers=4, batch_size=4, block_epochs=2, warmup_epochs=2)
    config = KUnBRConfig(**how, rtt_epochs=2, rtt_lrs=(1e-4,))
    data = Data.load([str(path) for path in files], [str(root / "r.jsonl")], tokenizer, config)
    run = Run(Architecture.load(root / "model")[0], data, config, Setup("cpu", stream=True))
    decoder, stream = opened(root / "model")
    records, retain = [load_records([str(path)]) for path in files], load_records([str(root / "r.jsonl")])
    folds, marks = [Fold(path.stem, part, part) for path, part in zip(files, records)], []

    def mark(text):
        marks.append((str(text), Counter(stream.traffic)))

    more = dict(tokenizer=tokenizer, folds=folds, output_dir=tmp_path / "out", progress=False)
    kf.unlearn(decoder.model, sum(records, []), retain, config, on_stage=mark, before_cleanup=mark, **more)
    counted = [(text, after - before) for (text, before), (_, after) in itertools.pairwise(marks)]
    for stage in run.stages():
        begun = dict(evaluation="accuracy", density="knowledge density").get(stage.name, stage.name.split(" 0")[0])
        found = next(count for text, count in counted if text.startswith(begun))
        # what was written answers once more; the self-check ended at the lowest layers, which are still in the buffers
        more = {"RTT attack": 6, "evaluation": -2}.get(stage.name, 0)
        back = Traffic(weights_in=more * run.layer)
        predicted = {what: n for what, n in dataclasses.asdict(stage.traffic + back).items() if n}
        assert predicted == pytest.approx(found, rel=0.001), stage.name


def test_resident_layers_take_memory():
    run, layer = tiny_run(resident_layers=3), tiny_run().layer
    taken = run.warm_up()
    assert taken.memory["resident"] == 3 * 2 * layer and taken.store == 5 * 2 * layer  # fp32 Lion: as much state
    assert tiny_run(resident_layers=8).warm_up().memory["layer buffers"] == 0


def test_what_finds_no_room_in_main_memory_goes_through_the_disk():
    run = tiny_run(cache="host")
    run.room = 4 * 2 * run.layer  # of eight layers' weights and state
    taken = run.warm_up()
    first = 14 * run.layer  # from the model's files
    assert sum(part.disk for part in taken.work) == pytest.approx(first + (taken.traffic.total - first) / 2)
    bounds = dict(
        flops="arithmetic", memory="memory", bus_in="bus", bus_out="bus", disk="disk", host="host", link="link"
    )
    for name, bound in bounds.items():
        assert run.stage("", Taken({}, [Work(**{name: 1e15})])).bound == bound


# ---------------------------------------------------------------- goals


@pytest.mark.parametrize("memory, masters", [("32GiB", "none"), ("32GiB", "stochastic"), ("64GiB", "stochastic")])
def test_llama_3_8b_on_24_gib(configs, memory, masters):
    """Stochastic rounding: half-precision weights that train at small learning rates."""
    how = dict(config=KUnBRConfig(warmup_master_weights=masters), memory=memory, disk_rate=3)
    found = plan(configs["8B"], "24GiB", gpu="4090", stream=True, **how)
    attack = [stage for stage in found.stages if stage.name == "RTT attack"]
    assert [stage.name for stage in found.stages][:3] == ["evaluation", "warm-up", "density"] and len(attack) == 1
    assert found.seconds - sum(stage.runs * stage.seconds for stage in attack) < 90 * 60
    assert max(stage.peak for stage in found.stages) + found.best.run.setup.reserve <= 24 << 30
    assert found.host + (4 << 30) <= found.best.run.setup.memory
    assert found.best.files == 0 if memory == "64GiB" else found.best.stream_cache < 28 << 30
    assert found.stages[0].traffic.total == 32 * found.best.run.layer  # each layer once for all questions


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
