"""Several gloo processes on a CPU against one: the same weights and densities, and what a lost process leaves."""

import contextlib
import functools
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_text
import torch
from distributed_runner import MEASURES, carry_out, measure, run
from helpers import environment, python
from safetensors.torch import load_file
from tiny_models import tiny_model

import kunbr_fast as kf
from kunbr_fast.cli import command as cli
from kunbr_fast.data.schedule import Schedule
from kunbr_fast.parallel.assign import block_cost, busiest_share, homes, spread_blocks
from kunbr_fast.parallel.group import Group
from kunbr_fast.parallel.sharded import check_shardable
from kunbr_fast.run.checks import check_sharding
from kunbr_fast.run.state import PartState, RunState

HERE = Path(__file__).parent.parent
BLOCKS = {"name": "blocks", "given": True, "layers": 10, "config": {"num_blocks": 5, "top_k": 4, "parallel": "blocks"}}
BLOCKS["config"] |= {"rounds": 2, "block_epochs": 1, "mask": "sure", "mask_ratio": 0.5}
CUMULATIVE = {"name": "cumulative", "config": {"insertion": "cumulative", "mask": "wagle"}}
CUMULATIVE["config"] |= {"adversary_every": 2, "adversary_lrs": [1e-3, 3e-3]}
SAMPLES = {
    "name": "samples",
    "given": True,
    "config": {"optimizer": "adamw", "parallel": "samples", "objective": "dpo", "retain_loss": "kl"},
}
PDU = {"name": "pdu", "config": {"insertion": "cumulative", "objective": "pdu", "warmup_optimizer": "adamw"}}
PDU["config"] |= {"retain_loss": "hidden_layers", "cache": "host", "cache_bytes": 20_000}
MIXED = {"name": "mixed", "given": True, "layers": 10, "config": {"num_blocks": 5, "top_k": 3, "optimizer": "adamw"}}
GA = {"name": "ga", "given": True, "config": {"parallel": "samples", "objective": "ga", "batch_size": 3}}
PARTS = {"sharding": "fsdp", "insertion": "cumulative", "top_k": 1, "warmup_optimizer": "adamw"}
SHARDED = {"name": "sharded", "config": PARTS | {"gradient_checkpointing": True, "micro_batch_tokens": 20}}
STEPS = {"name": "steps", "config": PARTS | {"objective": "pdu", "warmup_epochs": 2, "weight_decay": 0.1}}
TEXT = {"name": "text", "text": True, "config": PARTS | {"rtt": True, "scoring": "choice", "rtt_lrs": [1e-3]}}
TEXT["config"] |= {"rtt_epochs": 1, "rtt_attacks": ["full", "lora"], "rtt_batch_size": 3}
COVER = {"sharding": "fsdp_cover", "batch_size": 1, "retain_batch_size": 1, "optimizer": "adamw", "top_k": 1}
COVER = {"name": "cover", "given": True, "config": COVER | {"block_epochs": 1, "mask": "sure", "mask_ratio": 0.5}}
COVER["config"] |= {"micro_batch_tokens": 9}
DENSITY = {"name": "density", "density": MEASURES}


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


@contextlib.contextmanager
def processes(count, out, jobs):
    """Starts the runner `count` times and waits: yields (exit codes, what they said)."""
    group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    command = [sys.executable, HERE / "distributed_runner.py", out, *map(json.dumps, jobs)]
    started, logs = [], [out / f"{rank}.log" for rank in range(count)]
    try:
        for rank, log in enumerate(logs):
            with log.open("wb") as file:
                env = environment(RANK=str(rank), LOCAL_RANK=str(rank), **group)
                started.append(subprocess.Popen(command, env=env, stderr=file))
        until = time.monotonic() + 300
        while any(process.poll() is None for process in started) and time.monotonic() < until:
            time.sleep(0.1)
        said = [log.read_text()[-3000:] for log in logs]
        yield [process.poll() for process in started], said
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """The weights that one process makes of a job."""

    @functools.cache
    def weights(job):
        model, _ = run(json.loads(job), tmp_path_factory.mktemp("truth"))
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    return lambda job: weights(json.dumps({k: v for k, v in job.items() if k != "at"}))


def close(found, truth):
    assert found.keys() == truth.keys()
    for name, value in found.items():
        assert (value - truth[name]).norm() <= 1e-9 * truth[name].norm(), name


def equal(found, truth):
    assert found.keys() == truth.keys()
    assert [name for name, value in found.items() if not torch.equal(value, truth[name])] == []


def results(out, name, count):
    return [json.loads((out / f"{name}.{rank}.json").read_text()) for rank in range(count)]


def same_measures(found, one):
    for mine, other in zip(found["density"], one[0]):
        for key, value in other.items():
            assert value is None or mine[key] == pytest.approx(value, rel=1e-12, abs=0), key
    assert found["attribute"] == pytest.approx(one[1], rel=1e-9)


def same_answers(found, one):
    """Of nested numbers and names."""
    assert type(found) is type(one)
    if isinstance(one, dict | list):
        pairs = [(found[k], one[k]) for k in one] if isinstance(one, dict) else zip(found, one, strict=True)
        for mine, other in pairs:
            same_answers(mine, other)
    else:
        assert found == (pytest.approx(one, rel=1e-9) if isinstance(one, float) else one)


# ---------------------------------------------------------------- processes


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes left of all these."""
    out = tmp_path_factory.mktemp("two")
    differs = {"name": "differs", "given": True, "config": {}, "differs": {"block_lr": 2e-3}}
    refused = {"name": "refused", "config": PARTS | {"adversary_every": 2}}
    stop = {"at": {"rank": 1, "step": 3, "does": "stop"}}
    stopped = [STEPS | stop, COVER | {"name": "held"} | stop]
    fails = CUMULATIVE | {"name": "fails", "at": {"rank": 1, "step": 5, "does": "fail"}}  # in the second block
    jobs = [BLOCKS, CUMULATIVE, SAMPLES, PDU, DENSITY, SHARDED, TEXT, COVER, *stopped, refused, differs, fails]
    with processes(2, out, jobs) as (codes, said):
        assert codes == [0, 0], said
    return out


def test_two_processes(truth, two):
    """Blocks apart, steps shared, a density; a setting that differs; a process that fails, and the cure."""
    equal(load_file(two / "blocks.safetensors"), truth(BLOCKS))
    for job in (CUMULATIVE, SAMPLES, PDU):
        close(load_file(two / f"{job['name']}.safetensors"), truth(job))
    # 4 blocks, 2 rounds of 2 steps: of the 16 steps each process has made its 8, and none of the other's blocks
    updates = [set(found["updates"]) for found in results(two, "blocks", 2)]
    assert [len(found["updates"]) for found in results(two, "blocks", 2)] == [8, 8]
    assert updates[0] | updates[1] == {0, 2, 4, 6} and not updates[0] & updates[1]
    for found in results(two, "density", 2):
        same_measures(found, measure(DENSITY))
    for found in results(two, "differs", 2):
        assert found["error"].startswith("block_lr: rank 1 has 0.002, rank 0 0.001: start all processes with the same")
    others, failed = (found["error"] for found in results(two, "fails", 2))
    assert failed == "OSError: the disk of this machine is full"
    assert others == "ProcessGone: stopped, since rank 1 failed: the disk of this machine is full"
    model, updates = run(CUMULATIVE | {"name": "fails", "resume": True}, two)  # by one process
    assert len(updates) <= 6  # of 10: 4 were made, the last of them is kept or not
    close({n: p.detach() for n, p in model.named_parameters()}, truth(CUMULATIVE))


def test_two_processes_with_the_model_in_parts(truth, two, tmp_path):
    """Warm-up and attack; stopped in between, and gone on with by one process, also from a damaged file."""
    close(load_file(two / "sharded.safetensors"), truth(SHARDED))
    model, one = carry_out(TEXT, tmp_path)
    close(load_file(two / "text.safetensors"), {n: p.detach() for n, p in model.named_parameters()})
    both = results(two, "text", 2)
    for found in both:
        assert [row["attack"] for row in found["rtt"]] == ["full"] * 4 + ["lora"] * 4
        same_answers([found["accuracy"], found["rtt"]], [one["accuracy"], one["rtt"]])
    # AdamW's moments, in the warm-up and in both folds of the full attack
    full = [i for i, number in enumerate(one["held"]) if number == one["held"][0]]
    assert len(full) > 4 and all(sum(found["held"][i] for found in both) == one["held"][i] for i in full)
    assert max(found["held"][i] for found in both for i in full) <= 0.51 * one["held"][0]
    for found in results(two, "refused", 2):
        assert found["error"].startswith("sharding='fsdp': an adversary has weights of its own")

    assert [found["error"] for found in results(two, "steps", 2)] == ["Stopped", "Stopped"]
    kept = two / "steps" / "kunbr-checkpoints"
    names = [f"warmup-step-{step}.rank-{rank}.safetensors" for step in (2, 3) for rank in (0, 1)]
    assert sorted(path.name for path in kept.glob("warmup*")) == names
    shutil.copytree(two / "steps", tmp_path / "steps")
    damaged = bytearray((kept / names[3]).read_bytes())
    damaged[-1] ^= 1
    (kept / names[3]).write_bytes(damaged)
    for out, left in ((tmp_path, 1), (two, 2)):  # steps of the warm-up
        model, updates = run(STEPS | {"resume": True}, out)
        assert updates.count("warmup") == left
        close({n: p.detach() for n, p in model.named_parameters()}, truth(STEPS))


@pytest.mark.slow  # two and three of them are run always
def test_four_processes(truth, tmp_path):
    """More processes than samples in a step; blocks that do not go round; a process that is killed."""
    few = DENSITY | {"name": "few", "samples": 3}
    killed = CUMULATIVE | {"name": "killed", "at": {"rank": 2, "step": 4, "does": "kill"}}
    with processes(4, tmp_path, [BLOCKS, MIXED, GA, few, killed]) as (codes, said):
        assert codes == [0, 0, -9, 0], said
    equal(load_file(tmp_path / "blocks.safetensors"), truth(BLOCKS))
    assert [len(found["updates"]) for found in results(tmp_path, "blocks", 4)] == [4, 4, 4, 4]  # of 16
    for job in (MIXED, GA):
        close(load_file(tmp_path / f"{job['name']}.safetensors"), truth(job))
    assert {len(found["updates"]) for found in results(tmp_path, "mixed", 4)} == {12}  # all of them together
    same_measures(results(tmp_path, "few", 4)[3], measure(few))
    for rank in (0, 1, 3):
        error = json.loads((tmp_path / f"killed.{rank}.json").read_text())["error"]
        assert error.startswith("ProcessGone: stopped, since another process of this run has gone"), error
    model, updates = run(CUMULATIVE | {"name": "killed", "resume": True}, tmp_path)
    assert len(updates) <= 7
    close({n: p.detach() for n, p in model.named_parameters()}, truth(CUMULATIVE))


def test_two_processes_with_the_cover_in_parts(truth, two):
    """Steps of one forget and one retain sample; stopped in a block, and gone on with by one process."""
    close(load_file(two / "cover.safetensors"), truth(COVER))
    model, one = carry_out(COVER | {"name": "held", "resume": True}, two)
    assert (
        len(one["updates"]) == len(results(two, "cover", 2)[0]["updates"]) - 4
    )  # asked in the third step, all know in the fourth
    close({n: p.detach() for n, p in model.named_parameters()}, truth(COVER))
    for found in results(two, "cover", 2):  # the block's two layers, embedding and head are whole
        assert max(found["weights"]) < 0.71 * one["weights"][0]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"cache_dtype": "bf16"}, "sharding='fsdp_cover', cache_dtype='bf16': expected 'none'"),
        ({"cover_precision": "int8"}, "cover_precision='int8': expected 'none'"),
        ({"cache_bytes": 99}, "cache_bytes=99: expected None"),
        ({"parallel": "blocks"}, "parallel='blocks': all ranks train each block"),
        ({"adversary_every": 2}, "sharding='fsdp_cover': an adversary has weights of its own"),
    ],
)
def test_what_the_cover_cannot_be_beside(settings, message):
    said, config = [], kf.KUnBRConfig(sharding="fsdp_cover", **settings)
    decoder = SimpleNamespace(model=torch.nn.Linear(1, 1), layers=[])
    for size in (2, 1):
        context = SimpleNamespace(group=Group(0, size), reporter=SimpleNamespace(say=said.append))
        with pytest.raises(ValueError, match=re.escape(message)) if size > 1 else contextlib.nullcontext():
            check_sharding(decoder, config, context, warm_up=False, attacked=True)
    assert len(said) == 1 and "this is one process" in said[0]


def test_layers_that_cannot_be_in_parts_are_named():
    model = tiny_model()
    check_shardable(model, model.model.layers)
    model.model.layers[1].mlp.scale = torch.nn.Parameter(torch.tensor(1.0))
    with pytest.raises(
        ValueError, match=re.escape("model.layers.1.mlp.scale cannot be in parts, since it is a single")
    ):
        check_shardable(model, model.model.layers)
    model.model.layers[1].mlp.scale = torch.nn.Parameter(torch.ones(2, 3).t())
    with pytest.raises(ValueError, match="mlp.scale cannot be in parts, since it is not contiguous"):
        check_shardable(model, model.model.layers)
    model.model.layers[1].mlp.scale = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="since it is torch.float32, others of its layer torch.float64"):
        check_shardable(model, model.model.layers)
    del model.model.layers[1].mlp.scale
    model.model.layers[2].mlp.up_proj = model.model.layers[1].mlp.up_proj
    with pytest.raises(ValueError, match=re.escape("it is model.layers.2.mlp.up_proj.weight too")):
        check_shardable(model, model.model.layers)


@pytest.mark.slow  # two processes, and one that goes on, are run always
def test_parts_on_other_numbers_of_processes(truth, tmp_path):
    """Two processes, of which one runs out of memory; four, of which one is killed; four again."""
    few = SHARDED | {"name": "few", "config": PARTS | {"batch_size": 2, "retain_batch_size": 1}}
    built = {"name": "built", "config": PARTS | {"sharding": "fsdp_cover", "top_k": 2, "objective": "pdu"}}
    jobs = [SHARDED, few, TEXT, COVER, built]
    lacks = STEPS | {"at": {"rank": 1, "step": 1, "does": "memory"}}
    with processes(2, tmp_path, [lacks]) as (codes, said):
        assert codes == [0, 0], said
    other, failed = (found["error"] for found in results(tmp_path, "steps", 2))
    assert failed.startswith("OutOfMemory: out of memory with one sample of") and "(micro_batch_tokens)" in failed
    assert other.startswith("ProcessGone: stopped, since rank 1 failed: out of memory")
    killed = STEPS | {"resume": True, "at": {"rank": 2, "step": 2, "does": "kill"}}
    with processes(4, tmp_path, [killed]) as (codes, said):
        assert codes == [0, 0, -9, 0], said
    assert (tmp_path / "steps" / "kunbr-checkpoints" / "warmup-step-2.rank-3.safetensors").is_file()
    with processes(4, tmp_path, [STEPS | {"resume": True}, *jobs]) as (codes, said):
        assert codes == [0, 0, 0, 0], said
    assert results(tmp_path, "steps", 4)[3]["updates"].count("warmup") == 2
    for job in (STEPS, *jobs):
        close(load_file(tmp_path / f"{job['name']}.safetensors"), truth(job))


# ---------------------------------------------------------------- the command line

SETTINGS = """--dtype float64 --num-blocks 3 --top-k 2 --batch-size 3 --block-epochs 1 --block-lr 1e-3 --parallel blocks
    --target letter --rtt-lrs 1e-3 --rtt-epochs 1 --checkpoint-every 1 --quiet --json""".split()


def torchrun(count, *command):
    group = ["--master-port", free_port(), "--nproc-per-node", count]
    return python("-m", "torch.distributed.run", *group, *command)


@pytest.mark.slow  # tests/cli/test_signals.py stops two ranks and goes on
def test_command_line_killed_and_resumed(tmp_path, capfd):
    """torchrun; a process killed in its block; resumed by one process and by three, to an undisturbed run's bits."""
    workspace = tiny_text.workspace(tmp_path)
    tiny_text.model(seed=1).save_pretrained(tmp_path / "unlearned")
    arguments = ["unlearn", *tiny_text.inputs(workspace), "--unlearned", str(workspace / "unlearned"), *SETTINGS]
    assert cli.main([*arguments, "--out", str(tmp_path / "truth")]) == 0
    truth, report = load_file(tmp_path / "truth" / "model.safetensors"), json.loads(capfd.readouterr().out)

    killed = torchrun(2, HERE / "kill_runner.py", "rank 1, in its block", *arguments, "--out", tmp_path / "two")
    assert killed.returncode == 1 and "exitcode  : -9" in killed.stderr, killed.stderr[-3000:]
    assert (tmp_path / "two" / "kunbr-checkpoints" / "state.rank-1.json").is_file()
    shutil.copytree(tmp_path / "two", tmp_path / "three")
    assert cli.main([*arguments, "--out", str(tmp_path / "two"), "--resume"]) == 0
    again = json.loads(capfd.readouterr().out)
    resumed = torchrun(3, "-m", "kunbr_fast", *arguments, "--out", tmp_path / "three", "--resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    for out, found in (("two", again), ("three", json.loads(resumed.stdout))):  # one process has spoken
        equal(load_file(tmp_path / out / "model.safetensors"), truth)
        assert not (tmp_path / out / "kunbr-checkpoints").exists()
        for key in ("losses", "accuracy", "rtt", "blocks", "recovery"):
            assert found[key] == report[key], key


def test_errors_of_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["doctor", "--json"]) == 2
    assert "WORLD_SIZE=2 is set, RANK is not: start with torchrun" in capsys.readouterr().err


# ---------------------------------------------------------------- the plan


def efficiency(costs, size):
    alone, together = spread_blocks(costs, size, 1 / size, "blocks")
    assert sorted(i for part in alone for i in part) == list(range(len(costs))) and not together
    return sum(costs) / size / max(sum(costs[i] for i in part) for part in alone)


def test_blocks_of_uneven_costs_are_balanced():
    for layers, blocks, size in ((32, 8, 2), (32, 16, 4), (80, 20, 4), (80, 40, 8)):
        length = layers // blocks
        costs = [block_cost(range(s, s + length), layers) for s in range(0, layers - length, length)]
        assert efficiency(costs, size) >= 0.95, (layers, blocks, size)
    assert efficiency([1.0] * 4, 4) == 1.0


def test_what_does_not_go_round_is_trained_together():
    assert spread_blocks([1.0] * 4, 4, 0.25) == ([[0], [1], [2], [3]], [])
    assert spread_blocks([3.0, 2.0], 4, 0.3) == ([[], [], [], []], [0, 1])
    alone, together = spread_blocks([1.0] * 9, 4, 0.3)  # 2 + 0.375 is less than 3
    assert sorted(map(len, alone)) == [2, 2, 2, 2] and len(together) == 1
    assert spread_blocks([1.0] * 9, 4, 1.0)[1] == []  # steps that cannot be divided
    assert spread_blocks([2.0, 1.0], 2, 0.5, "samples") == ([[], []], [0, 1])


def test_homes_are_even_in_every_step():
    schedule = Schedule(100, 100, 16, 16, 3, 0)
    steps = [
        [*forget, *(100 + i for i in retain)] for forget, retain in map(schedule.__getitem__, range(len(schedule)))
    ]
    sizes = [20 + 7 * i % 30 for i in range(200)]
    home = homes(steps, sizes, 4)
    assert home == homes(steps, sizes, 4)
    held = [sum(size for size, rank in zip(sizes, home) if rank == r) for r in range(4)]
    assert max(held) < 1.1 * sum(sizes) / 4
    share, modulo = (busiest_share(steps, sizes, h, 4) for h in (home, [i % 4 for i in range(200)]))
    assert share < 0.31 < modulo


# ---------------------------------------------------------------- the state


def test_the_state_of_processes_that_work_apart(tmp_path):
    config, x, trained = kf.KUnBRConfig(), {"x": torch.ones(2)}, {"epochs": []}
    extra = {"epochs": [], "sums": None, "recent": [], "seconds": 0.0, "micro_batch_tokens": None}
    whole = RunState(tmp_path, "run", config, False)
    whole.finish("selection", {"blocks": []})
    parts = [PartState(whole, rank) for rank in range(2)]
    assert parts[0].result("selection") == {"blocks": []}
    parts[0].finish("blocks.0.0-2", trained, x)
    parts[0].save_progress("blocks.0.2-4", 1, x, extra)
    parts[1].save_progress("blocks.0.4-6", 1, x, extra)
    parts[1].save_progress("blocks.0.4-6", 2, {"x": torch.zeros(2)}, extra)
    for _ in range(2):  # also if it is killed in between: what is taken over twice is the same
        kept = [(path, path.read_bytes()) for path in tmp_path.glob("state.rank-*.json")]
        again = RunState(tmp_path, "run", config, True)
        assert not list(tmp_path.glob("state.rank-*.json"))
        for path, content in kept:
            path.write_bytes(content)
    assert again.result("blocks.0.0-2")["file"] == "blocks.0.0-2.safetensors"
    assert [again.progress(f"blocks.0.{b}")[0] for b in ("2-4", "4-6")] == [1, 2]
    part = PartState(again, 0)  # another process goes on with what one had begun
    assert part.progress("blocks.0.4-6")[1]["x"].tolist() == [0, 0]
    part.finish("blocks.0.4-6", trained, x)
    assert not (tmp_path / "blocks.0.4-6-step-2.safetensors").exists()
    again = RunState(tmp_path, "run", config, True)
    assert again.progress("blocks.0.4-6") is None and again.file("blocks.0.4-6").is_file()
    with pytest.raises(ValueError, match="block_lr was"):
        RunState(tmp_path, "run", kf.KUnBRConfig(block_lr=1.0), True)
    part.state["identity"] = "other"
    part._write()
    with pytest.raises(ValueError, match=re.escape("state.rank-0.json: belongs to another run")):
        RunState(tmp_path, "run", config, True)
