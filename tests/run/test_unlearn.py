"""The five stages as one call: against the reference procedure, and what the report says."""

import copy
import json
from pathlib import Path

import pytest
import tiny_text
import torch
from helpers import rarely
from reference_procedure import ReferenceLion, padded_loss, reference_block
from tiny_models import random_samples, tiny_model

import kunbr_fast as kf
from kunbr_fast.data.schedule import Schedule
from kunbr_fast.evaluation.rtt import Fold
from kunbr_fast.files import checksums
from kunbr_fast.kernels.dispatch import Unavailable

SETTINGS = dict(
    batch_size=5, retain_batch_size=4, retain_coeff=1.5, warmup_epochs=2, warmup_lr=1e-3, num_blocks=3, top_k=2,
    block_epochs=2, block_lr=1e-3, seed=3, rtt=False, overlap="allow",  # some tests keep what they forget
)  # fmt: skip


def reference_run(model, forget, retain, config, blocks, rounds=1):
    """Warm-up, then each block in turn, then merge: two whole models, plainly."""

    def batches(epochs, number):
        schedule = Schedule(
            len(forget), len(retain), config.batch_size, config.retain_size, epochs, config.seed * 1000 + number
        )
        for step in range(len(schedule)):
            f, r = schedule[step]
            yield [forget[i] for i in f], [retain[i] for i in r]

    original, unlearned = model, copy.deepcopy(model)
    optimizer = ReferenceLion(unlearned.parameters(), config.warmup_lr)
    for f, r in batches(config.warmup_epochs, 0):
        optimizer.zero_grad()
        (-padded_loss(unlearned, f) + config.retain_coeff * padded_loss(unlearned, r)).backward()
        optimizer.step()
    optimizer.zero_grad()
    for visit in range(rounds * len(blocks)):
        reference_block(
            original, unlearned, "model.layers", blocks[visit % len(blocks)],
            list(batches(config.block_epochs, 1 + visit)), config.block_lr, config.retain_coeff, config.insertion,
        )  # fmt: skip
    return unlearned


@pytest.mark.parametrize(
    "insertion, rounds",
    [
        pytest.param("independent", 1, marks=pytest.mark.slow),
        ("independent", 2),
        pytest.param("cumulative", 1, marks=pytest.mark.slow),
        ("cumulative", 2),
    ],
)
def test_a_whole_run_equals_the_reference_procedure(insertion, rounds, tmp_path):
    forget, retain = random_samples(10, seed=1), random_samples(12, seed=2)
    model = tiny_model("llama")
    truth_start = copy.deepcopy(model)
    config = kf.KUnBRConfig(**SETTINGS, insertion=insertion, rounds=rounds)
    report = kf.unlearn(model, forget, retain, config, output_dir=tmp_path, progress=False)
    truth = reference_run(truth_start, forget, retain, config, report.blocks, rounds)
    for (name, ours), theirs in zip(model.named_parameters(), truth.parameters()):
        assert (ours - theirs).norm() <= 1e-9 * theirs.norm(), name
    assert not (tmp_path / "kunbr-checkpoints").exists()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_blocks_are_the_densest_of_the_original():
    forget, retain = random_samples(6, seed=1), random_samples(6, seed=2)
    model = tiny_model("qwen2")
    density = kf.knowledge_density(model, forget)
    report = kf.unlearn(model, forget, retain, kf.KUnBRConfig(**SETTINGS), progress=False)
    assert torch.equal(report.density.per_layer, density.per_layer)
    sums = {b: float(density.per_layer[b.start : b.stop].sum()) for b in [range(0, 2), range(2, 4)]}
    assert report.blocks == sorted(sums, key=lambda b: b.start)  # the block of the last two layers never is
    assert {name for name in report.losses} == {"warmup", "blocks.0.0-2", "blocks.0.2-4"}
    assert all(len(epochs) == 2 for epochs in report.losses.values())


def test_ones_own_unlearned_model_replaces_the_warm_up():
    forget, retain = random_samples(6, seed=1), random_samples(6, seed=2)
    original = tiny_model("llama", seed=0)
    mine = tiny_model("llama", seed=1)
    kept = {n: p.clone() for n, p in mine.named_parameters()}
    report = kf.unlearn(original, forget, retain, kf.KUnBRConfig(**SETTINGS), unlearned=mine, progress=False)
    trained = {f"model.layers.{i}." for b in report.blocks for i in b}
    for name, parameter in original.named_parameters():
        inside = any(name.startswith(prefix) for prefix in trained)
        assert torch.equal(parameter, kept[name]) != inside, name
        assert torch.equal(kept[name], dict(mine.named_parameters())[name])  # the caller's model is left alone
    assert "warmup" not in report.losses


def test_an_unlearned_model_of_another_shape_is_refused():
    samples = random_samples(4)
    other = tiny_model("llama", intermediate_size=40)
    with pytest.raises(
        ValueError, match=r"model\.layers\.0\.mlp\.gate_proj\.weight is \(40, 32\) there and \(48, 32\)"
    ):
        kf.unlearn(tiny_model("llama"), samples, samples, kf.KUnBRConfig(**SETTINGS), unlearned=other, progress=False)


def test_report_has_accuracy_recovery_and_rtt(tmp_path):
    tokenizer = tiny_text.tokenizer()
    folds = [Fold(f"f{i}", [tiny_text.question(n) for n in tiny_text.NAMES[6 * i : 6 * i + 6]], None) for i in range(2)]
    folds = [Fold(f.name, f.train_records, f.train_records) for f in folds]
    forget = [r for f in folds for r in f.train_records]
    retain = [tiny_text.question(n) for n in tiny_text.NAMES[12:]]
    kinds = ("full", "other_facts", "int8")
    attack = dict(rtt=True, rtt_lrs=(1e-3,), rtt_epochs=2, rtt_attacks=kinds)
    config = kf.KUnBRConfig(**{**SETTINGS, **attack}, target="letter")
    model = tiny_text.model()
    report = kf.unlearn(model, forget, retain, config, tokenizer=tokenizer, folds=folds, progress=False)
    assert set(report.accuracy) == {"original", "unlearned", "result"}
    assert report.accuracy["result"]["forget"]["num_questions"] == 12
    assert report.rtt.before == pytest.approx(report.accuracy["result"]["forget"]["plain"])
    assert report.recovery == pytest.approx(report.rtt.accuracy - report.accuracy["result"]["forget"]["plain"])
    assert len(report.rtt.curves) == 2 * (3 + 3 + 2) and report.rtt.attacks == list(kinds)
    assert json.loads(json.dumps(report.to_dict()))["rtt"]["attacks"].keys() == set(kinds)
    from kunbr_fast.evaluation.accuracy import choice_accuracy
    from kunbr_fast.model.decoder import Decoder

    again = choice_accuracy(Decoder(model), tokenizer, retain)  # the model holds the result that was measured
    assert again.plain == report.accuracy["result"]["retain"]["plain"]

    examples, places = report.to_dict()["examples"], [0, 1, 3, 4, 6, 7, 9, 10]  # 8 of 12, spread evenly
    models = {"original": tiny_text.model(), "result": model}
    said = {name: choice_accuracy(Decoder(each), tokenizer, forget).predictions for name, each in models.items()}
    for row, i in zip(examples, places, strict=True):
        assert (row["question"], row["answer"]) == (forget[i]["question"], str(tiny_text.years()[tiny_text.NAMES[i]]))
        assert {name: row[name] for name in said} == {name: str(forget[i]["choices"][said[name][i]]) for name in said}
    right = [row["attacked"] == row["answer"] for row in examples]
    assert right == [forget[i]["answer"] == answer for i, answer in zip(places, report.rtt.answers)]
    assert "answers" not in report.accuracy["result"]["forget"]


def test_settings_that_leave_no_block_fail_before_anything_is_trained():
    samples = random_samples(4)
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="top_k=3: expected 1 to 2"):
        kf.unlearn(model, samples, samples, kf.KUnBRConfig(**{**SETTINGS, "top_k": 3}), progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("forget, retain, what", [([], random_samples(2), "forget"), (random_samples(2), [], "retain")])
def test_an_empty_set_is_refused(forget, retain, what):
    with pytest.raises(ValueError, match=f"the {what} set is empty"):
        kf.unlearn(tiny_model("llama"), forget, retain, kf.KUnBRConfig(**SETTINGS), progress=False)


def test_tokens_beyond_the_vocabulary_are_refused():
    samples = random_samples(2)
    samples[1]["input_ids"][0] = 97
    with pytest.raises(ValueError, match="token id 97, but the model embeds 97"):
        kf.unlearn(tiny_model("llama"), samples, random_samples(2), kf.KUnBRConfig(**SETTINGS), progress=False)


def test_a_nan_weight_is_named():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[2, 5] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.3\.mlp\.up_proj\.weight: 1 of 1536 values are NaN"):
        kf.unlearn(model, random_samples(2), random_samples(2), kf.KUnBRConfig(**SETTINGS), progress=False)


def refused(match, *args, **options):
    """`unlearn` refuses before it has computed anything."""
    stages = []
    with pytest.raises(ValueError, match=match):
        kf.unlearn(*args, progress=False, on_stage=stages.append, **options)
    assert [text for text in stages if "are the same fact" not in text] == []


@pytest.mark.parametrize("max_length, limit", [(None, 64), (100, 64), (20, 20)])
def test_tokens_longer_than_the_limit_are_reported(max_length, limit):
    long, short = random_samples(3, low=limit + 1, high=limit + 1), random_samples(3)
    config = kf.KUnBRConfig(**SETTINGS, max_length=max_length)
    message = rf"longer than max_length={limit}: forget sample 3 \({limit + 1} tokens\), .* nothing is cut"
    refused(message, tiny_model("gpt2"), short + long, short, config)
    with pytest.raises(ValueError, match="a sample of 65 tokens: GPT2LMHeadModel has 64 positions"):
        kf.knowledge_density(tiny_model("gpt2"), random_samples(1, low=65, high=65))


def test_what_a_later_stage_needs_is_checked_first():
    samples, model = random_samples(4), tiny_model("llama")
    config = kf.KUnBRConfig(**SETTINGS)
    questions = [tiny_text.question(n) for n in tiny_text.NAMES]
    refused("give tokenizer=", model, samples, samples, config, forget_questions=questions)
    unlabelled = [{"input_ids": torch.arange(4), "labels": torch.full((4,), -100)}]
    refused("retain sample 4: no token after its first has a label", model, samples, samples + unlabelled, config)
    folds = [Fold("a", [{"text": "no digit"}], questions), Fold("b", questions, questions)]
    refused(
        "target='number' but there is no digit", tiny_text.model(), questions, questions,
        kf.KUnBRConfig(**{**SETTINGS, "rtt": True, "rtt_target": "number"}),
            tokenizer=tiny_text.tokenizer(), folds=folds,
    )  # fmt: skip
    broken = tiny_model("llama", seed=1)
    with torch.no_grad():
        broken.model.embed_tokens.weight[50, 0] = float("inf")  # a token that the decoder's self-check does not meet
    refused(r"^model.embed_tokens.weight: 1 of", broken, samples, samples, config)
    refused(
        r"^the unlearned model's model.embed_tokens.weight: 1 of", model, samples, samples, config, unlearned=broken
    )
    with pytest.raises(Unavailable, match='impl="cuda" cannot run on cpu'):
        kf.unlearn(model, samples, samples, kf.KUnBRConfig(**SETTINGS, impl="cuda"), progress=False)
    with pytest.raises(Unavailable, match="cuda_graphs=True: the model is on cpu"):
        kf.unlearn(model, samples, samples, kf.KUnBRConfig(**SETTINGS, cuda_graphs=True), progress=False)


def test_resume_with_another_unlearned_model_is_refused(tmp_path):
    samples, config = random_samples(6), kf.KUnBRConfig(**SETTINGS)

    def run(unlearned, **options):
        kf.unlearn(
            tiny_model("llama"),
            samples,
            samples,
            config,
            unlearned=unlearned,
            output_dir=tmp_path,
            progress=False,
            **options,
        )

    def stop(report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_model("llama", seed=1), before_cleanup=stop)
    with pytest.raises(ValueError, match="with another unlearned model"):
        run(tiny_model("llama", seed=2), resume=True)
    with pytest.raises(KeyboardInterrupt):
        run(None, before_cleanup=stop, resume=True)
    run(tiny_model("llama", seed=1), resume=True)
    assert not (tmp_path / "kunbr-checkpoints").exists()


def test_a_line_that_changes_sides_is_another_run(tmp_path):
    samples, config = random_samples(8), kf.KUnBRConfig(**SETTINGS)

    def stop(report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kf.unlearn(
            tiny_model("llama"),
            samples[:4],
            samples[4:],
            config,
            output_dir=tmp_path,
            progress=False,
            before_cleanup=stop,
        )
    with pytest.raises(ValueError, match="belongs to another run"):
        kf.unlearn(
            tiny_model("llama"), samples[:5], samples[5:], config, output_dir=tmp_path, progress=False, resume=True
        )


@pytest.mark.parametrize("insertion", rarely(["independent", "cumulative"], ["cumulative"]))
def test_a_block_keeps_the_file_of_its_last_round_alone_and_resumes_from_it(insertion, tmp_path):
    forget, retain = random_samples(6, seed=1), random_samples(6, seed=2)
    config = kf.KUnBRConfig(**SETTINGS, insertion=insertion, rounds=3)
    model, truth, killed = tiny_model("llama"), tiny_model("llama"), []
    kf.unlearn(truth, forget, retain, config, output_dir=tmp_path / "truth", progress=False)

    def kill(text):
        if text.startswith("re-insertion") and "round 3" in text:  # the first of two blocks, then the second
            killed.append(
                sorted(path.name for path in (tmp_path / "run" / "kunbr-checkpoints").glob("blocks*.safetensors"))
            )
            if len(killed) in (1, 3):
                raise KeyboardInterrupt

    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            kf.unlearn(
                model, forget, retain, config, output_dir=tmp_path / "run", progress=False, resume=resume, on_stage=kill
            )
        model = tiny_model("llama")
    kf.unlearn(model, forget, retain, config, output_dir=tmp_path / "run", progress=False, resume=True)
    files = {
        "independent": [["blocks.1.0-2"], ["blocks.1.0-2"], ["blocks.1.2-4", "blocks.2.0-2"]],  # block by block
        "cumulative": [["blocks.1.0-2", "blocks.1.2-4"]] * 2 + [["blocks.1.2-4", "blocks.2.0-2"]],
    }
    assert killed[:3] == [[f"{name}.safetensors" for name in names] for names in files[insertion]]
    for (name, ours), theirs in zip(model.named_parameters(), truth.parameters()):
        assert torch.equal(ours, theirs), name


def test_a_file_that_was_just_written_is_not_read_again_for_its_checksum(tmp_path, monkeypatch):
    read = []
    checksum = checksums.sha256
    monkeypatch.setattr(checksums, "sha256", lambda path, *more: read.append(Path(path).name) or checksum(path, *more))
    forget, retain = random_samples(6, seed=1), random_samples(6, seed=2)
    kf.unlearn(tiny_model("llama"), forget, retain, kf.KUnBRConfig(**SETTINGS), output_dir=tmp_path, progress=False)
    assert read.count("warmup.safetensors") == 1 and len(read) == len(set(read))
