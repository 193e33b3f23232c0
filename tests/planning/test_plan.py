"""kunbr-fast plan: predictions are what is counted and measured, and the settings that it writes are the fastest."""

import gc
import json
import re
import time

import pytest
import tiny_text
import torch
import transformers as tf
from tiny_models import CONFIGS, MORE, peak_bytes, random_samples, rotary_flops

from kunbr_fast import KUnBRConfig, PrefixCache, reinserted
from kunbr_fast.benchmarks.scripts import count_step
from kunbr_fast.cli import command as cli
from kunbr_fast.data import encode, load_records, pack
from kunbr_fast.density.measure import knowledge_density
from kunbr_fast.evaluation.rtt import RTTConfig
from kunbr_fast.files.models import load_tokenizer
from kunbr_fast.memory import Place
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.frozen import frozen
from kunbr_fast.model.patch import fused
from kunbr_fast.objectives.layer_states import LayerStates
from kunbr_fast.objectives.original import OriginalValues
from kunbr_fast.planning.costs import KINDS, Architecture, Batch, Step
from kunbr_fast.planning.lengths import Data, assumed_lengths
from kunbr_fast.planning.machines import Setup
from kunbr_fast.planning.plan import plan
from kunbr_fast.planning.predict import Run
from kunbr_fast.planning.tried import duration
from kunbr_fast.training.full import FullTraining
from kunbr_fast.training.training import relearned_batch
from kunbr_fast.values import parse_bytes

SHAPE = dict(vocab_size=499, hidden_size=128, intermediate_size=344, num_hidden_layers=6, num_attention_heads=4)
ROTARY = dict(**SHAPE, num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2)
MEASURED = {
    "llama": lambda: tf.LlamaConfig(**ROTARY),
    "tied": lambda: tf.LlamaConfig(**ROTARY, tie_word_embeddings=True),
    "qwen3": lambda: tf.Qwen3Config(**ROTARY, head_dim=32),
    "gpt2": lambda: tf.GPT2Config(vocab_size=499, n_embd=128, n_layer=6, n_head=4, bos_token_id=1, eos_token_id=2),
}
L405 = dict(
    model_type="llama", vocab_size=128256, hidden_size=16384, intermediate_size=53248, num_hidden_layers=126,
    num_attention_heads=128, num_key_value_heads=8, torch_dtype="bfloat16",
)  # fmt: skip
L8 = {**L405, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}


def most_bytes(function):
    """peak_bytes, with what earlier tests have left behind freed before: its log would know that."""
    gc.collect()
    return peak_bytes(function)


def write(path, values):
    path.write_text(json.dumps(values))
    return str(path)


def sizes(samples):
    return [(len(s["input_ids"]), int((s["labels"][1:] != -100).sum())) for s in samples]


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize("name", [*CONFIGS, *MORE])
def test_parameters_are_exact(name, tmp_path):
    config = (CONFIGS | MORE)[name]()
    for tied in (False, True):
        config.tie_word_embeddings = tied
        config.to_json_file(tmp_path / "config.json", use_diff=False)
        with torch.device("meta"):
            model = tf.AutoModelForCausalLM.from_config(config)
        a, assumed = Architecture.load(tmp_path, "float32")
        assert (a.parameters, assumed) == (sum(p.numel() for p in model.parameters()), [])
        assert a.largest == max(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_what_config_json_leaves_out_is_transformers_default(name, tmp_path):
    small = dict(vocab_size=211, hidden_size=64, intermediate_size=40, num_hidden_layers=3, num_attention_heads=32)
    if name == "gpt2":
        small = dict(vocab_size=211, n_positions=48, n_embd=48, n_layer=3, n_head=4)
    write(tmp_path / "config.json", {"model_type": name, "pad_token_id": 0, **small})
    a, assumed = Architecture.load(tmp_path)
    config = tf.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(config)
    assert a.parameters == sum(p.numel() for p in model.parameters())
    assert len(assumed) == 1 and assumed[0].startswith("dtype ")


@pytest.mark.parametrize("target", ["all", "letter"])
@pytest.mark.parametrize("block", [range(0, 2), range(2, 4)])
def test_flops_and_peak_of_a_step_as_count_step_counts_them(block, target, monkeypatch):
    monkeypatch.setitem(count_step.MODELS, "tiny", count_step.MODELS["Llama-3-8B"].__class__(128, 352, 6, 4, 2, 499))
    model = count_step.build("tiny", torch.bfloat16)
    data = count_step.questions(12, 499, target)
    counted = count_step.ours(model, block, data[:6], data[6:])
    a = Architecture.of(model.config, "llama", "bfloat16")
    step = Step(a, Batch.of(sizes(data)), block, torch=False, start=block.start)
    assert step.flops() == counted["flops"] - rotary_flops(model, sum(length for length, _ in sizes(data)))
    assert sum(step.memory().values()) == pytest.approx(counted["peak_bytes"], rel=0.1)


def test_llama_3_8b_within_a_hundredth_of_count_step():
    model, data, block = (
        count_step.build("Llama-3-8B", torch.bfloat16),
        count_step.questions(12, 128256, "all"),
        range(24, 28),
    )
    counted = count_step.ours(model, block, data[:6], data[6:])
    step = Step(Architecture.of(model.config, "llama", "bfloat16"), Batch.of(sizes(data)), block, torch=False, start=24)
    assert step.flops() == counted["flops"] - rotary_flops(model, sum(length for length, _ in sizes(data)))
    assert sum(step.memory().values()) == pytest.approx(counted["peak_bytes"], rel=0.01)


# ---------------------------------------------------------------- memory, against the allocator's own log


def stage(config, dtype, data, checkpoint=False, **settings):
    """(the planner's run, the model's maker) of six forget and six retain samples."""
    a = Architecture.of(config, config.model_type, dtype)
    settings = KUnBRConfig(batch_size=6, gradient_checkpointing=checkpoint, block_epochs=1, warmup_epochs=1, **settings)
    found = sizes(data)
    run = Run(a, Data(found[:6], found[6:], [], []), settings, Setup("cpu"))
    return run, lambda: tf.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def measured_block(make, data, block, checkpoint, **settings):
    def run():
        model = make()
        decoder, values = Decoder(model), {name: p.detach() for name, p in model.named_parameters()}
        cache = PrefixCache(decoder, data, "host")
        cache.advance(block.start)
        original = OriginalValues({})
        if settings.get("retain_loss") == "hidden_layers":
            original = original.with_states(LayerStates(decoder, data[6:], range(6), Place("host")), 6)
        with reinserted(
            decoder, values, block, 1e-3, gradient_checkpointing=checkpoint, impl="torch", **settings
        ) as training:
            for _ in range(2):
                values = original.batch(range(12)) if original.states else None
                relearned = [relearned_batch(cache.batch(range(3)))] * training.relearned_before
                training.step_packed(training.criterion.step_batch(cache.batch(range(12)), 6, values), relearned)

    return most_bytes(run)


@pytest.mark.parametrize(
    "name, dtype, checkpoint, length",
    [("llama", "float32", False, 40), ("gpt2", "float32", True, 40), ("tied", "bfloat16", False, 40)]
    + [
        pytest.param(*each, marks=pytest.mark.slow)
        for each in (("qwen3", "float32", True, 40), ("gpt2", "float32", False, 40), ("llama", "bfloat16", False, 4))
    ],
)
def test_peak_of_a_block(name, dtype, checkpoint, length):
    data = random_samples(12, low=length // 2, high=length, vocab=499)  # of short samples the update is the peak
    run, make = stage(MEASURED[name](), dtype, data, checkpoint)
    predicted = run.stage("", run.block(range(1, 3)))
    assert predicted.peak == pytest.approx(measured_block(make, data, range(1, 3), checkpoint), rel=0.1)
    assert (predicted.memory["master"] > 0) == (dtype == "bfloat16")


def test_peak_of_a_block_without_master_weights_and_with_adamw():
    data = random_samples(12, low=10, high=20, vocab=499)
    for settings in (
        dict(master_weights="none"),
        dict(optimizer="adamw"),
        dict(optimizer="adamw", master_weights="none"),
        dict(adversary_every=4),
        dict(adversary_every=4, adversary_reach="model"),
    ):
        run, make = stage(MEASURED["llama"](), "bfloat16", data, **settings)
        predicted = run.stage("", run.block(range(1, 3))).peak
        assert predicted == pytest.approx(measured_block(make, data, range(1, 3), False, **settings), rel=0.1), settings


def test_the_originals_hidden_states_and_the_differences_count():
    """The last layer's output is needed at all tokens."""
    data, how = random_samples(12, low=20, high=40, vocab=499), dict(retain_loss="hidden_layers", num_blocks=6, top_k=2)
    run, make = stage(MEASURED["llama"](), "float32", data, True, **how)
    plain, _ = stage(MEASURED["llama"](), "float32", data, True)
    tokens, predicted = sum(len(s["input_ids"]) for s in data[6:]), run.stage("", run.block(range(1, 3)))
    assert predicted.memory["hidden states"] == 6 * tokens * 128 * 4
    assert predicted.peak - plain.stage("", plain.block(range(1, 3))).peak >= (6 + 5) * tokens * 128 * 4
    measured = measured_block(make, data, range(1, 3), True, retain_loss="hidden_layers")
    assert predicted.peak == pytest.approx(measured, rel=0.1)
    (states,) = (s for s in run.stages() if s.name == "hidden states")
    assert states.flops > 0 and states.memory["hidden states"] == predicted.memory["hidden states"]
    few, _ = stage(MEASURED["llama"](), "float32", data, True, **how, retain_layers=[4])
    assert few.stage("", few.block(range(1, 3))).memory["hidden states"] == tokens * 128 * 4


@pytest.mark.parametrize(
    "name, checkpoint, every", [("llama", False, 0), ("tied", True, 0), ("gpt2", False, 0), ("llama", False, 4)]
)
def test_peak_of_the_warm_up(name, checkpoint, every):
    data, adversary = random_samples(12, low=30, high=60, vocab=499), {"adversary_every": every}
    run, make = stage(MEASURED[name](), "float32", data, checkpoint, **adversary)

    def warm_up():
        model = make()
        with frozen(model), fused(model, "torch"):
            training = FullTraining(
                Decoder(model), lr=1e-5, optimizer="lion", gradient_checkpointing=checkpoint, impl="torch", **adversary
            )
            for _ in range(2):
                relearned = [relearned_batch(pack(data[:3]))] * training.relearned_before
                training.step_packed(training.criterion.step_batch(pack(data), 6), relearned)

    assert run.stage("warm-up", run.warm_up()).peak == pytest.approx(most_bytes(warm_up), rel=0.1)


def test_peak_of_density_and_attack():
    data = random_samples(12, low=30, high=60, vocab=499)
    run, make = stage(MEASURED["llama"](), "float32", data, rtt_batch_size=6, rtt_epochs=1)
    run.data.forget = sizes(data)
    assert run.density().peak == pytest.approx(most_bytes(lambda: knowledge_density(Decoder(make()), data)), rel=0.1)
    run.data.folds = [sizes(data)[:6], sizes(data)[6:]]

    def attack():
        training_on = data[:6], data[6:]
        model = make()
        with frozen(model):
            training = FullTraining(Decoder(model), lr=1e-5, optimizer=RTTConfig().optimizer, impl="torch")
            for part in (*training_on, *training_on):
                training.step_packed(training.criterion.step_batch(pack(part), 0))

    assert run.attack().peak == pytest.approx(most_bytes(attack), rel=0.1)


def test_attacks_are_counted_each_with_its_epochs():
    def attack(*kinds, lrs=(1e-5, 2e-5)):
        data = random_samples(12, low=30, high=60, vocab=499)
        run, _ = stage(MEASURED["llama"](), "float32", data, rtt_epochs=2, rtt_attacks=kinds, rtt_lrs=lrs)
        run.data.folds = [sizes(data)[:6], sizes(data)[6:]]
        found = run.attack()
        return found.runs, found.flops * found.runs

    (runs, full), (lora_runs, lora), (long_runs, long) = attack("full"), attack("lora"), attack("long")
    assert (runs, lora_runs, long_runs) == (2, 2, 2) and lora == full
    rounds, asked = attack("int8")
    asked /= 2  # before all, and after the rounding
    assert rounds == 1 and 2 * (full - 5 * asked) < long < 4 * full
    assert attack("lion") == (4, pytest.approx(2 * full - asked))
    assert attack("full", "lora", "int8") == (5, pytest.approx(2 * full))


# ---------------------------------------------------------------- data


def test_assumed_lengths_are_wmdps():
    lengths = assumed_lengths(785)
    assert abs(sum(lengths) / 785 - 77) < 1 and max(lengths) == 224
    assert assumed_lengths(1) and len(assumed_lengths(1000)) == 1000
    assert max(sum(lengths[i : i + 6]) for i in range(0, 780, 6)) < 6 * 120  # long ones do not stand together


def test_real_lengths_where_there_is_a_tokenizer(tmp_path):
    root = tiny_text.workspace(tmp_path)
    files = dict(forget=[str(root / "f0.jsonl"), str(root / "f1.jsonl")], retain=[str(root / "r.jsonl")])
    tokenizer = load_tokenizer(root / "model")
    config = KUnBRConfig(num_blocks=3, top_k=1, target="letter")
    data = Data.load(**files, tokenizer=tokenizer, config=config)
    truth = encode(load_records(files["forget"]), tokenizer, "letter")
    assert data.forget == sizes(truth) and len(data.folds) == 2 and data.assumed == []
    assert [n for part in data.folds for n, _ in part] == [n for n, _ in data.forget]
    found = plan(root / "model", "1GiB", gpu="cpu", **files, config=config)
    assert not any("WMDP" in text for text in found.assumed)
    for file in (root / "model").glob("*token*"):
        file.unlink()
    found = plan(root / "model", "1GiB", gpu="cpu", **files, config=config)
    assert any("there is no tokenizer" in text for text in found.assumed)


# ---------------------------------------------------------------- the choice


def test_405b_takes_no_time(tmp_path):
    path = write(tmp_path / "config.json", L405)
    plan(path, "9TB")  # imports
    begin = time.process_time()
    found = plan(path, "9TB")
    assert time.process_time() - begin < 2
    assert "405.85 billion parameters" in found.title


def test_the_fastest_settings_that_fit(tmp_path):
    path, quick = write(tmp_path / "config.json", L8), KUnBRConfig(rtt=False)
    common = dict(gpu="4090", unlearned=True, config=quick)
    found = plan(path, "1TB", **common)
    plain = dict(gradient_checkpointing=False, cache="device", optimizer_device="device", micro_batch_tokens=None)
    assert found.settings == plain  # of settings that are as fast the plainest
    assert [s.name for s in found.stages][:3] == ["evaluation", "density", "re-insertion 0-3"]
    for row in found.tried[::8]:  # whatever the memory, the fastest of those that fit, up to the tolerance
        smaller = plan(path, row["peak_bytes"], **common)
        chosen = next(other for other in smaller.tried if other["settings"] == smaller.settings)
        fits = [other for other in smaller.tried if other["peak_bytes"] <= row["peak_bytes"]]
        assert fits == [other for other in smaller.tried if other["fits"]] and chosen in fits
        assert chosen["seconds"] <= 1.02 * min(other["seconds"] for other in fits)
    rows = {tuple(row["settings"].values()): row for row in found.tried}
    for place, name in ((1, "host"), (2, "host")):  # less memory, more time
        other = [*plain.values()]
        other[place] = name
        assert rows[tuple(other)]["seconds"] > rows[tuple(plain.values())]["seconds"]


def test_the_least_memory_in_the_error_is_enough(tmp_path):
    path, common = write(tmp_path / "config.json", L8), dict(gpu="4090", unlearned=True, config=KUnBRConfig(rtt=False))
    least = min(row["peak_bytes"] for row in plan(path, "1TB", **common).tried)
    found = plan(path, least, **common)
    assert found.settings["optimizer_device"] == "host" and found.settings["cache"] != "device"
    block = found.stages[-1].memory
    assert block["master"] == block["optimiser"] == 0 < block["gradient"] == block["block copy"]
    assert found.stages[-1].host > 10 * block["gradient"] / 2  # fp32 weights and momentum, the copies, the cache
    with pytest.raises(ValueError, match=r"does not fit: .*re-insertion .* GiB.*num_blocks: (\d+) or more") as error:
        plan(path, least - 1, **common)
    number = int(re.search(r"num_blocks: (\d+)", str(error.value))[1])
    common["config"] = KUnBRConfig(rtt=False, num_blocks=number)
    assert max(s.peak for s in plan(path, least - 1, **common).stages) < least


def test_several_gpus(tmp_path):
    path = write(tmp_path / "config.json", L8)
    one, four = (plan(path, "80GiB", gpus=n, config=KUnBRConfig(rtt=False)) for n in (1, 4))
    times = [[sum(s.runs * s.seconds for s in p.stages if s.name.startswith("re-")) for p in (one, four)]]
    assert 3 < times[0][0] / times[0][1] <= 4
    assert [s.peak for s in one.stages] == [s.peak for s in four.stages]
    assert one.stages[0].runs == four.stages[0].runs == 3


def test_each_stage_that_does_not_fit_is_named_with_a_cure(tmp_path):
    path = write(tmp_path / "config.json", L8)
    for config, cure in ((KUnBRConfig(), "RTT attack .*rtt: false"), (KUnBRConfig(rtt=False), "warm-up .*--unlearned")):
        with pytest.raises(ValueError, match=cure):
            plan(path, "30GB", config=config)


# ---------------------------------------------------------------- the command


def run(capsys, *arguments):
    status = cli.main(["plan", *arguments])
    out = capsys.readouterr()
    return status, out.out, out.err


def test_the_command(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    write(tmp_path / "model" / "config.json", L8)
    common = ["--model", str(tmp_path / "model"), "--gpu-memory", "24GiB", "--gpu", "4090", "--unlearned", "--no-rtt"]
    common += ["--num-blocks", "16", "--top-k", "12"]
    status, out, _ = run(capsys, *common, "--out", str(tmp_path / "run.yaml"))
    assert status == 0 and out.startswith("PREDICTED, not measured: llama, 8.03 billion parameters in bfloat16")
    for text in (
        "re-insertion 0-1",
        "(10 blocks more)",
        "block copy",
        "chosen: gradient_checkpointing: true, cache: device",
    ):
        assert text in out
    assert "assumed: 785 forget" in out and "does not fit" in out
    config = KUnBRConfig.load(tmp_path / "run.yaml")
    assert (config.gradient_checkpointing, config.cache, config.num_blocks, config.rtt) == (True, "device", 16, False)
    status, out, _ = run(capsys, *common, "--json")
    found = json.loads(out)
    assert found["predicted"] is True and found["settings"]["gradient_checkpointing"] is True
    assert found["peak_bytes"] == max(s["peak_bytes"] for s in found["stages"]) + found["reserve_bytes"] < 24 * 2**30
    assert found["seconds"] == pytest.approx(sum(s["runs"] * s["seconds"] for s in found["stages"]))


@pytest.mark.parametrize(
    "change, message",
    [
        ("{", "config.json: not JSON"),
        ({"model_type": "mamba"}, "model_type 'mamba' is not one that can be planned: llama,"),
        ({"model_type": "llama", "hidden_size": 8}, "has no vocab_size, intermediate_size, num_hidden_layers"),
        ({**L8, "hidden_size": "wide"}, "hidden_size is 'wide', expected a whole number"),
        ({**L8, "hidden_act": 3}, "hidden_act is 3, expected a name"),
        (None, "no such file"),
    ],
)
def test_errors_of_the_model_name_the_file(change, message, tmp_path, capsys):
    path = tmp_path / "config.json"
    if change is not None:
        path.write_text(change if isinstance(change, str) else json.dumps(change))
    status, _, error = run(capsys, "--model", str(path), "--gpu-memory", "24GiB")
    assert status == 2 and str(path) in error and message in error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--gpu-memory", "1TB", "--gpu", "v100"], "known are h200"),
        (["--gpu-memory", "1TB", "--gpus", "2", "--stream", "--unlearned"], "--gpus 2: expected 1 with"),
        (["--gpu-memory", "1TB", "--forget", "f.jsonl"], "--forget and --retain go together"),
        (["--gpu-memory", "1TB", "--gpu", "cpu", "--memory", "1TB"], "--gpu cpu has no other main memory"),
        (["--gpu-memory", "1TB", "--stream", "--adversary-every", "4"], "holds no second model"),
        (["--gpu-memory", "1TB", "--top-k", "9"], "top_k=9"),
    ],
)
def test_errors_of_the_arguments(arguments, message, tmp_path, capsys):
    status, _, error = run(capsys, "--model", write(tmp_path / "config.json", L8), *arguments)
    assert status == 2 and message in error


def test_sizes_and_durations():
    sizes = {"24GiB": 24 * 2**30, "80 GB": 80 * 10**9, "1.5mib": 3 << 19}
    assert {text: parse_bytes(text, "x", unit_needed=True) for text in sizes} == sizes
    assert [duration(s) for s in (0.5, 30, 300, 8000, 3e5)] == ["0.5 s", "30 s", "5.0 min", "2.2 h", "3.5 d"]
