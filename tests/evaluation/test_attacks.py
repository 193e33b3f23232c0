"""Attacks that were not rehearsed: each with its own rates and curve, the weights exact afterwards, resumable alone."""

import importlib.util
import json

import pytest
import torch
from test_rtt import assert_untouched, make_config, make_decoder, make_folds, statement, tokenizer, weights
from tiny_models import random_samples, tiny_model

from kunbr_fast.data import Schedule
from kunbr_fast.evaluation import rtt
from kunbr_fast.evaluation.attacks import ATTACKS, chosen_attacks, rounded
from kunbr_fast.evaluation.curves import RTTResult
from kunbr_fast.evaluation.lora import SCALE, Lora, LoraTraining, chosen_targets, train_lora
from kunbr_fast.evaluation.report import attack_table
from kunbr_fast.evaluation.rtt import Attack, RTTConfig, finished_attacks
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.training import fine_tune as training

ALL = tuple(ATTACKS)
assert tokenizer  # a fixture


OTHERS = [statement("Gil", 1962), statement("Hal", 1984), statement("Ida", 1951)]


def attack_of(decoder, tokenizer, said=None, others=OTHERS, **change):
    return Attack(decoder, tokenizer, make_folds(), make_config(**change), (said or []).append, others)


@pytest.fixture(scope="module")
def attacked(tokenizer, tmp_path_factory):
    """(decoder, its weights before, the finished rows in order, the result) of all attacks."""
    decoder, finished, folder = make_decoder(tokenizer), [], tmp_path_factory.mktemp("attacked")
    before = weights(decoder)
    attack = attack_of(decoder, tokenizer, attacks="all")
    result = attack.run(folder, False, on_result=finished.append)
    assert_untouched(decoder, before)
    assert list(folder.iterdir()) == []
    return finished, result


def test_each_attack_has_its_own_curve(attacked):
    _, result = attacked
    assert tuple(result.attacks) == ALL
    assert result.rates("full") == [1e-3, 1e-2] and result.epochs("full") == [0, 1, 2]
    assert result.rates("wide") == [3.33e-4, 3e-2]
    assert result.rates("lion") == [1e-4, 1e-3, 3.33e-4, 3.33e-3]
    assert result.epochs("long") == [0, 4, 8]
    assert result.rates("lora") == [1e-2, 1e-1] and result.rates("other_facts") == [1e-3, 1e-2]
    assert result.rates("int8") == result.rates("nf4") == [0.0] and result.epochs("nf4") == [0, 1]
    starts = {result.curve(lr, key, a)[0] for a in ALL for lr in result.rates(a) for key in ("smooth",)}
    assert len(starts) == 1, "all begin at the same model"
    assert result.accuracy == max(max(result.curve(lr, attack=a)[1:]) for a in ALL for lr in result.rates(a))
    attack, lr, epoch = result.strongest
    assert result.curve(lr, attack=attack)[result.epochs(attack).index(epoch)] == result.accuracy
    assert result.best == (lr, epoch)
    assert result.smooth_accuracy == max(max(result.curve(r, "smooth", a)[1:]) for a in ALL for r in result.rates(a))


def test_the_summary_is_the_curves(attacked):
    _, result = attacked
    written = json.loads(json.dumps(result.to_dict()))
    assert RTTResult.from_dict(written) == result
    assert written["strongest"]["attack"] == result.strongest.attack and set(written["attacks"]) == set(ALL)
    lines = attack_table(result).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["before", "guessing", *ALL]
    assert [line.split()[3:6] for line in lines[-2:]] == [["-", "|", "-"]] * 2, "nothing was trained"
    full = written["attacks"]["full"]
    assert f"{100 * full['accuracy']:.1f} ± {100 * full['standard_error']:.1f} %" in lines[4]
    assert f"{100 * full['smooth_accuracy']:.1f} ± {100 * full['smooth_error']:.1f} %" in lines[4]
    ends = [row for row in result.curves if row["attack"] == "long" and row["epoch"] == 8]
    assert full["leak"] != written["attacks"]["long"]["leak"] and result.leaks("long")[-1] == pytest.approx(
        max(sum(row["leak"][-1] for row in ends if row["lr"] == lr) / 3 for lr in (1e-3, 1e-2))
    )


def test_standard_error_is_the_binomial_one_of_folds_of_unlike_size():
    rows = [
        {"fold": fold, "lr": 1e-3, "epoch": e, "plain": p, "calibrated": None, "num_questions": n}
        for fold, p, n in (("a", 0.5, 100), ("b", 0.2, 40))
        for e in (0, 1)
    ]
    result = RTTResult(rows)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.rand(20_000, n, generator=generator).lt(p).double().mean(1) for p, n in ((0.5, 100), (0.2, 40))]
    assert result.standard_error == pytest.approx(float(((100 * drawn[0] + 40 * drawn[1]) / 140).std()), rel=0.02)
    for row in rows:
        del row["num_questions"]
    assert RTTResult(rows).standard_error is None, "earlier versions have not kept it"


@pytest.mark.parametrize("left", [0, 5])
def test_each_is_resumed_on_its_own(attacked, tokenizer, tmp_path, monkeypatch, left):
    """Of the last 5 (attack, fold, lr), two are of `long` and three of one rounding, for all folds."""
    finished, whole = attacked
    kept = len(finished) - left
    done = json.loads(json.dumps([row for rows in finished[:kept] for row in rows]))
    attack = attack_of(make_decoder(tokenizer), tokenizer, attacks="all")
    ran, real, later = [], training.train_all, []
    monkeypatch.setattr(rtt, "train_all", lambda *a, **o: (ran.append(o), real(*a, **o)))
    assert attack.run(tmp_path, False, done, later.append) == whole
    assert later == finished[kept:]


def test_rows_of_an_earlier_version_are_of_the_full_attack(attacked, tokenizer, tmp_path, monkeypatch):
    finished, whole = attacked
    old = ("fold", "lr", "epoch", "plain", "calibrated")
    done = [{key: row[key] for key in old} for rows in finished for row in rows if row["attack"] == "full"]
    monkeypatch.setattr(rtt, "train_all", None)
    result = Attack(make_decoder(tokenizer), tokenizer, make_folds(), make_config()).run(tmp_path, False, done)
    assert result.accuracy == whole.summary("full")["accuracy"]
    assert result.smooth_accuracy is None and result.leaks() is None and result.standard_error is None
    newer = [row for rows in finished for row in rows if row["attack"] == "int8"]
    mixed = RTTResult(done + newer)
    assert mixed.smooth_accuracy is None and mixed.summary("int8")["smooth_accuracy"] is not None


def test_attacks_are_shared_by_ranks(attacked, tokenizer, tmp_path):
    _, whole = attacked
    done = []
    config = make_config(attacks=("full", "int8"))
    for rank in (0, 1):
        attack = Attack(make_decoder(tokenizer), tokenizer, make_folds(), config)
        assert attack.run(tmp_path / f"{rank}", False, (), done.extend, (rank, 2)) is None
    result = attack.run(tmp_path, False, done, None)
    assert result.curves == [row for row in whole.curves if row["attack"] in config.attacks]


def test_a_diverged_attack_is_told_and_the_others_go_on(tokenizer, tmp_path):
    decoder, said, finished = make_decoder(tokenizer), [], []
    before = weights(decoder)
    config = make_config(lrs=(1e-3, 3e29), attacks=("lion", "int8"), epochs=1)
    attack = Attack(decoder, tokenizer, make_folds(2), config, said.append)
    result = attack.run(tmp_path, False, on_result=finished.append)
    assert_untouched(decoder, before)
    assert result.attacks == ["lion", "int8"] and result.rates("lion") == [1e-4, 3.33e-4]
    assert {(found["attack"], found["lr"]) for found in result.diverged} == {("lion", 3e28), ("lion", 1e29)}
    assert len(said) == 4 and "RTT attack lion split_0, lr 3e+28: diverged at step 0" in said[0]
    assert "diverged" in attack_table(result) and RTTResult.from_dict(result.to_dict()) == result
    done = [row for rows in finished for row in rows]
    assert len(finished_attacks(done, make_folds(2), config)) == 2 * 5, "what diverged is not tried again"
    with pytest.raises(rtt.AttackDiverged, match="every attack diverged .lion.: take lower"):
        attack = Attack(decoder, tokenizer, make_folds(2), make_config(lrs=(3e29,), attacks="lion"))
        attack.run(tmp_path, False)


# --------------------------------------------------------------------------------------------- other facts


def test_other_facts_are_taught_once_and_all_folds_asked(attacked, tokenizer, tmp_path, monkeypatch):
    finished, whole = attacked
    ran, real = [], training.train_all

    def watched(decoder, samples, **options):
        ran.append((options["lr"], [sample["input_ids"].tolist() for sample in samples]))
        real(decoder, samples, **options)

    monkeypatch.setattr(rtt, "train_all", watched)
    attack = attack_of(make_decoder(tokenizer), tokenizer, attacks="other_facts")
    taught = [tokenizer(record["text"])["input_ids"] for record in OTHERS]
    mine = [rows for rows in finished if rows[0]["attack"] == "other_facts"]
    assert len(mine) == 2 * 3, "each fold is kept for itself"
    later = []
    assert attack.run(tmp_path, False, mine[0], later.append).summary("other_facts") == whole.summary("other_facts")
    assert ran == [(lr, taught) for lr in (1e-3, 1e-2)]
    assert later == mine[1:], "one fold was kept, the training is made again for the others"


def test_other_facts_must_be_others(tokenizer):
    def attack(others, **change):
        return attack_of(make_decoder(tokenizer), tokenizer, others=others, attacks="other_facts", **change)

    with pytest.raises(ValueError, match="the attack other_facts has nothing to teach"):
        attack([])
    with pytest.raises(ValueError, match=r"t:Ada and t:Ada are the same fact, in a fold and in the other facts"):
        attack([statement("Gil", 1962), statement("Ada", 1951)])
    assert attack([statement("Ada", 1951)], overlap="allow")
    assert attack([statement("Ada", 1973)]), "another Ada"
    samples = attack(OTHERS)._others
    assert torch.equal(attack(samples)._others[1]["input_ids"], samples[1]["input_ids"]), "samples do as well"


# ----------------------------------------------------------------------------------------------------- LoRA


MLP = {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    "architecture, lora, theirs",
    [
        ("llama", Lora(), "all"),
        ("gpt2", Lora(), "all"),
        ("llama", Lora(3, ("down_proj", "self_attn.q_proj")), {"down_proj", "q_proj"}),
        ("llama", Lora(8, ("mlp",)), MLP),
        ("gpt2", Lora(2, ("attention",)), {"c_attn", "attn.c_proj"}),
    ],
)
def test_lora_is_pefts(architecture, lora, theirs):
    """Three epochs in fp64: the merged weights of PEFT's model, trained by torch's AdamW on the same batches."""

    def model():
        return tiny_model(architecture, num_hidden_layers=2)

    peft = pytest.importorskip("peft")
    samples, how = random_samples(7), dict(lr=1e-2, epochs=3, batch_size=3, seed=5)
    decoder = Decoder(model())
    first = LoraTraining(decoder, 1e-2, 5, lora)
    names = {id(p): name for name, p in decoder.model.named_parameters()}
    begun = {names[id(adapter.parameter)]: adapter.a.detach().clone() for adapter in first.adapters}
    targets = sorted({name.split(".")[-2] for name in begun} if theirs == "all" else theirs)
    alpha, conv = lora.rank * SCALE, architecture == "gpt2"
    settings = dict(r=lora.rank, lora_alpha=alpha, target_modules=targets, fan_in_fan_out=conv)
    theirs = peft.get_peft_model(model(), peft.LoraConfig(**settings, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, a in begun.items():
            theirs.get_submodule(f"base_model.model.{name.removesuffix('.weight')}").lora_A["default"].weight.copy_(a)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(begun)
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.999), weight_decay=0.0)
    for indices, _ in Schedule(len(samples), 0, 3, 1, 3, 5):
        total = 0.0
        for sample in (samples[i] for i in indices):
            logits = theirs(input_ids=sample["input_ids"][None]).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, sample["labels"][1:]) / len(indices)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    merged = dict(theirs.merge_and_unload().named_parameters())
    train_lora(decoder, samples, lora=lora, **how)
    for name, weight in decoder.model.named_parameters():
        torch.testing.assert_close(weight, merged[name], rtol=0, atol=1e-9)
        assert (name in begun) == (not torch.equal(weight, dict(model().named_parameters())[name]))


def test_which_linear_layers_have_adapters():
    decoder = Decoder(tiny_model("llama", num_hidden_layers=2))
    assert len(Lora(8, ("attention", "mlp")).linears(decoder)) == len(Lora().linears(decoder)) == 2 * 7
    assert [number for number, _ in Lora(8, ("o_proj", "attention")).linears(decoder)] == [0] * 4 + [1] * 4
    known = "all, attention, mlp, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj$"
    with pytest.raises(ValueError, match=f"lora_targets='proj': LlamaForCausalLM's layers .*expected some of {known}"):
        Lora(8, ("q_proj", "proj")).linears(decoder)
    for wrong in ((), ("all", "all"), 3, "", ("q_proj", None)):
        with pytest.raises(ValueError, match="rtt_lora_targets=.*expected one or more different ones of all, "):
            chosen_targets(wrong, "rtt_lora_targets")
    assert RTTConfig(lora_targets="mlp").lora_targets == ("mlp",)
    with pytest.raises(ValueError, match="lora_rank=0: expected a whole number from 1"):
        RTTConfig(lora_rank=0)


# ------------------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_rounding_moves_each_matrix_to_the_nearest(architecture):
    model = tiny_model(architecture, torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with rounded(Decoder(model), "int8"):
        pass
    for name, weight in model.named_parameters():
        if weight.dim() < 2 or "layers." not in name and ".h." not in name:
            assert torch.equal(weight, before[name]), name
            continue
        own = before[name].t() if architecture == "gpt2" else before[name]
        step = own.abs().amax(-1, keepdim=True) / 127
        off = ((weight.t() if architecture == "gpt2" else weight).detach() - own).abs() / step
        assert 0.4 < float(off.max()) <= 0.5 + 1e-4, name


def test_nf4_takes_the_nearest_of_16_values():
    model = tiny_model("llama")
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    with rounded(Decoder(model), "nf4"):
        pass
    after = model.model.layers[0].mlp.up_proj.weight.detach()
    blocks, found = before.view(-1, 64), after.view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    from kunbr_fast.evaluation.attacks import NF4

    values = torch.tensor(NF4, dtype=torch.float64) * largest
    nearest = (blocks[:, :, None] - values[:, None, :]).abs().argmin(2)
    torch.testing.assert_close(found, values.gather(1, nearest), rtol=1e-12, atol=0)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_nf4_is_the_one_of_bitsandbytes():
    from kunbr_fast.evaluation.attacks import _nf4
    from kunbr_fast.model.low_precision import quantize

    weight = torch.randn(7, 45, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(_nf4(weight), quantize(weight, "nf4").dense(torch.float32), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------- settings


def test_which_attacks():
    assert RTTConfig().attacks == ("full",) and RTTConfig(attacks="all").attacks == ALL
    assert RTTConfig(attacks=["nf4", "full"]).attacks == ("nf4", "full")
    with pytest.raises(ValueError, match=r"rtt_attacks='lyon': expected some of full, wide.*or all alone$"):
        chosen_attacks("lyon", "rtt_attacks")
    for wrong in ((), ("full", "full"), ("all", "full"), (1,), None, {"full": 1}):
        with pytest.raises(ValueError, match="attacks="):
            RTTConfig(attacks=wrong)
