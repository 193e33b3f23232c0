"""DEEP_UNL on this engine trains what the authors' class trains: fp64, 1e-9, for losses of every kind."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from authors_class import LR, RETAIN_COEFF, StandIn, every_place, letter, published
from helpers import rarely
from reference_procedure import left_padded, padded, padded_loss, reference_block
from tiny_models import moved, peak_bytes, random_samples, tiny_model

from kunbr_fast.integrations.deep_unl import DEEP_UNL, _Batch
from kunbr_fast.integrations.recognise import positions_are_relative, recognise
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.training.diverged import Diverged

BLOCKS = dict(block_num=3, num_layers=6, compare_train_times=2)


# ---------------------------------------------------------------- losses a Base_model may have


def ours(batch, model):
    return padded_loss(model, batch)


def wrong_answer(batch, model):
    ids, mask, labels = padded(batch)
    wrong = torch.where(labels == -100, labels, (labels + 7) % 97)
    return model(input_ids=ids, attention_mask=mask, labels=wrong).loss  # the model's own: a mean over all tokens


def bent(batch, model):
    return -2 * F.logsigmoid(padded_loss(model, batch) / 2)


def capped(batch, model):
    ids, mask, labels = padded(batch)
    nll = F.cross_entropy(model(input_ids=ids, attention_mask=mask).logits[:, :-1].transpose(1, 2), labels[:, 1:],
                          reduction="none")  # fmt: skip
    return nll.clamp(max=30).sum()


def smoothed(batch, model):
    ids, mask, labels = padded(batch)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1)


def two_passes(batch, model):
    return padded_loss(model, batch[:1]) + (padded_loss(model, batch[1:]) if len(batch) > 1 else 0)


SUMS = [ours, letter, wrong_answer, every_place]
OTHERS = [bent, capped, smoothed, two_passes]


# ---------------------------------------------------------------- the stand-in, and the truth


def pair(get_loss, architecture="llama", **options):
    original = tiny_model(architecture)
    unlearned = moved(original)
    return [StandIn(copy.deepcopy(unlearned), original, get_loss, **options) for _ in range(2)]


def assert_same(base, truth, tolerance=1e-9):
    start, trained = dict(moved(base.original).named_parameters()), set()
    for (name, ours_), theirs in zip(base.model.named_parameters(), truth.model.parameters()):
        assert (ours_ - theirs).norm() <= tolerance * theirs.norm(), name
        if not torch.equal(ours_, start[name]):
            trained.add(int(name.split(".")[2]))
    assert [call[:2] for call in base.calls] == [call[:2] for call in truth.calls]
    for mine, other in zip(base.calls, truth.calls):
        assert mine[2] == pytest.approx(other[2], rel=1e-6)  # rotary angles are fp32
    return trained


def run(base, epochs, seed=3, path="elsewhere", **options):
    random.seed(seed)
    deep = DEEP_UNL(base, compare_model_path=path, **(BLOCKS | options))
    deep.dynamic_deep_unlearning(epochs)
    return deep


@pytest.mark.parametrize(
    "get_loss", rarely(SUMS + OTHERS, [letter, wrong_answer, every_place, two_passes]), ids=lambda f: f.__name__
)
def test_same_weights_as_two_models_and_their_own_loss(get_loss, monkeypatch):
    base, truth = pair(get_loss)
    calls = []
    base.loss = lambda batch, model: calls.append(1) or get_loss(batch, model)
    before = copy.deepcopy(base.original.state_dict())
    run(base, 5)
    random.seed(3)
    published(truth, 5, **{k: v for k, v in BLOCKS.items()})
    assert assert_same(base, truth) == {0, 1, 2, 3, 4, 5}
    assert all(torch.equal(value, before[name]) for name, value in base.original.state_dict().items())
    batches, steps = 3 + 4, 5 * 3
    if get_loss in SUMS:
        assert len(calls) <= 2 * batches  # each is asked twice, whatever the number of steps
    else:
        assert len(calls) >= 2 * steps


def test_same_weights_as_the_reference_procedure():
    base, truth = pair(ours)
    run(base, 6)
    random.seed(3)
    original = copy.deepcopy(truth.original)
    retain = [truth.val_retain_dataset[i : i + 4] for i in range(0, 14, 4)]
    for visit in range(6):
        random.random()
        batches = [
            (truth.val_forget_dataset[4 * i : 4 * i + 4], retain[i * random.randint(1, 10000) % 4]) for i in range(3)
        ]
        block = range(visit // 2 * 2, visit // 2 * 2 + 2)
        reference_block(original, truth.model, "model.layers", block, batches, LR, RETAIN_COEFF)
    truth.calls = base.calls
    assert assert_same(base, truth) == set(range(6))


@pytest.mark.parametrize(
    "options", [pytest.param(dict(choose_num=2), marks=pytest.mark.slow), dict(compare_train_times=1)]
)
def test_order_of_visits_also_past_the_last_one(options):
    """choose_num blocks at once; and all of them at once when each has had its visits."""
    base, truth = pair(ours)
    options = BLOCKS | options
    deep = run(base, 5, **options)
    random.seed(3)
    published(truth, 5, **options)
    assert_same(base, truth)
    assert list(deep.history_cache.values()) == [3, 3, 3]


def test_several_calls_and_epochs_of_the_base_model(tmp_path):
    base, truth = pair(ours, epochs=2, eval_every=3)
    base.original.save_pretrained(tmp_path / "m0")
    base.load_llm = lambda path: pytest.fail("M0 is read from its files")
    random.seed(3)
    deep = DEEP_UNL(base, compare_model_path=str(tmp_path / "m0"), **BLOCKS)
    deep.dynamic_deep_unlearning(None)
    deep.dynamic_deep_unlearning(1)
    random.seed(3)
    published(truth, 2, **BLOCKS)
    assert deep.history_cache == {"block0": 2, "block1": 1, "block2": 0}
    batches = []
    random.random()
    retain = [truth.val_retain_dataset[i : i + 4] for i in range(0, 14, 4)]
    for i in range(3):
        batches.append((truth.val_forget_dataset[4 * i : 4 * i + 4], retain[i * random.randint(1, 10000) % 4]))
    reference_block(copy.deepcopy(truth.original), truth.model, "model.layers", range(2, 4), batches, LR, RETAIN_COEFF)
    truth.calls = base.calls
    assert assert_same(base, truth) == {0, 1, 2, 3}


@pytest.mark.parametrize("architecture,relative", [("llama", True), ("gemma2", True), ("gpt2", False)])
def test_left_padding_without_positions(architecture, relative):
    """A rotary model does not see where its padding ends, so the batch is packed; GPT-2 does, so it is not."""

    def shifted(batch, model):
        ids, mask, labels = left_padded(batch)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum") / 3

    model, points = tiny_model(architecture), random_samples(4, 1, low=8)
    for point in points:
        point["labels"][0] = -100  # here it would be predicted, by padding
    decoder = Decoder(model)
    assert positions_are_relative(decoder) == relative
    batch = _Batch(points, shifted)
    assert batch.look(decoder) == relative
    if relative:
        packed = batch.packed(0)
        logits = decoder.logits(packed, packed.rows)
        nll = F.cross_entropy(logits, packed.targets, reduction="none").detach()
        assert packed.num_tokens == sum(len(p["input_ids"]) for p in points)
        if architecture == "llama":  # Gemma's eager fp64 mask makes NaN of padding
            assert float(batch.weights @ nll) == pytest.approx(shifted(points, model).item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_weights_of_a_recognised_loss(architecture, dtype):
    model, points = tiny_model(architecture, dtype), random_samples(5, 4)
    samples, weights = recognise(Decoder(model), lambda m: padded_loss(m, points)).samples(Decoder(model))
    rows = [int((p["labels"][1:] != -100).sum()) for p in points]
    assert torch.allclose(weights, torch.cat([torch.full((n,), 1 / n / 5) for n in rows]), rtol=1e-5)
    for sample, point in zip(samples, points):
        assert torch.equal(sample["input_ids"], point["input_ids"])
        assert torch.equal(sample["labels"][1:], point["labels"][1:])
    for other in (lambda m: torch.zeros(()), lambda m: bent(points, m), lambda m: padded_loss(m, points).detach()):
        assert recognise(Decoder(model), other) is None


def test_a_line_of_padding_alone_is_no_sample():
    """As an empty text of a batch gives one; a mean over the grid counts it."""
    ids = torch.arange(12).view(2, 6)
    mask = torch.tensor([[1] * 6, [0] * 6])
    decoder = Decoder(tiny_model())
    found = recognise(decoder, lambda m: m(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)[..., 3].mean())
    assert found.live.all() and found.samples(decoder) is None


def test_after_an_error_the_model_is_m_u_with_the_finished_visits():
    base, truth = pair(ours)
    loss, flags = base.eval, {n: p.requires_grad for n, p in base.model.named_parameters()}

    def failing(time, **options):
        if time == 2:
            raise KeyboardInterrupt
        return loss(time, **options)

    base.eval = failing
    with pytest.raises(KeyboardInterrupt):
        run(base, 4)
    random.seed(3)
    published(truth, 2, **BLOCKS)
    base.calls = truth.calls
    assert assert_same(base, truth) == {0, 1}
    assert flags == {n: p.requires_grad for n, p in base.model.named_parameters()}
    assert not any(p.grad is not None for p in base.model.parameters())


def test_nan_stops_the_run():
    base, _ = pair(lambda batch, model: padded_loss(model, batch) * torch.nan)
    before = copy.deepcopy(base.model.state_dict())
    with pytest.raises(Diverged, match="block 0-1, step 0"):
        run(base, 1)
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())


def test_one_model_and_the_block_in_memory(tmp_path):
    original = tiny_model("llama", torch.float32, num_hidden_layers=16, hidden_size=64, intermediate_size=128)
    original.save_pretrained(tmp_path / "m0")
    model = moved(original)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    base = StandIn(model, None, ours)
    base.eval = base.eval_on_RTV = lambda *args, **options: 0.0
    base.val_forget_dataset, base.val_retain_dataset = random_samples(2, 1), random_samples(2, 2)
    deep = DEEP_UNL(base, 16, compare_model_path=str(tmp_path / "m0"), num_layers=16)
    peak = peak_bytes(lambda: deep.dynamic_deep_unlearning(3), 0.9 * size)  # not counted: the mapped files
    assert peak < 0.9 * size  # a second model alone would be 1; the block's weights, gradient and momentum are 0.2


def test_refusals(tmp_path):
    base, _ = pair(ours)
    with pytest.raises(ValueError, match="compare_model_path"):
        DEEP_UNL(base)
    with pytest.raises(ValueError, match="block_num=0: expected 1 to 32"):
        DEEP_UNL(base, 0, compare_model_path="elsewhere")
    with pytest.raises(ValueError, match="choose_num=0"):
        DEEP_UNL(base, choose_num=0, compare_model_path="elsewhere")
    with pytest.raises(ValueError, match=r"block2 begins at layer 8 of 6: give num_layers=6, or fewer epochs"):
        DEEP_UNL(base, compare_model_path="elsewhere").dynamic_deep_unlearning(3)
    assert base.calls == []
    tiny_model(num_hidden_layers=2).save_pretrained(tmp_path / "small")
    base.load_llm = lambda path: tf.AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    with pytest.raises(ValueError, match=r"small has no model.layers.2"):
        DEEP_UNL(base, compare_model_path=tmp_path / "small")
    tiny_model(intermediate_size=40).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match=r"mlp.gate_proj.weight is \(40, 32\) in .*narrow and \(48, 32\) in the model"):
        DEEP_UNL(base, compare_model_path=tmp_path / "narrow")
    base.load_llm, base.val_retain_dataset = (lambda path: base.original), []
    with pytest.raises(ValueError, match="val_retain_dataset is empty"):
        run(base, 1)


# ---------------------------------------------------------------- the work flow


class Base_model(StandIn):
    """A stand-in with the constructor that work_flow.py calls, on directories."""

    def __init__(self, data_load_name, base_model, diff_tokenizer, project_name, lr, retain_coeff, name, k_shot, epochs,
                 batch_size, val_batch_size, eval_every):  # fmt: skip
        super().__init__(self.load_llm(base_model), None, letter, batch_size, eval_every, epochs)
        self.lr, self.retain_coeff = lr, retain_coeff

    def load_llm(self, path):
        return tf.AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()

    def save_model(self, path):
        self.model.save_pretrained(path)


def test_the_work_flow(tmp_path):
    original = tiny_model()
    original.save_pretrained(tmp_path / "have_knowledge")
    unlearned = moved(original)
    unlearned.save_pretrained(tmp_path / "unlearned")
    base_model = Base_model(
        data_load_name="WMDP",
        base_model=str(tmp_path / "unlearned"),
        diff_tokenizer=str(tmp_path / "have_knowledge"),
        project_name="exp_data",
        lr=1e-3,
        retain_coeff=1,
        name="WMDP_biru-ungd",
        k_shot=0,
        epochs=3,
        batch_size=6,
        val_batch_size=32,
        eval_every=4,
    )
    deep_unlearn = DEEP_UNL(
        base_model, choose_num=1, compare_train_times=3, compare_model_path=str(tmp_path / "have_knowledge")
    )
    deep_unlearn.dynamic_deep_unlearning(4)  # with 32 layers taken for granted: layers 0 to 3, then 4 and 5
    base_model.save_model(str(tmp_path / "out"))
    after = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, unlearned.state_dict()[name])}
    assert {int(name.split(".")[2]) for name in changed} == set(range(6))
    assert [call[:2] for call in base_model.calls] == [
        ("dynamic_GD_deep_unlearning", 0),
        *(("eval on compare_model", epoch) for epoch in range(4)),
        ("dynamic_GD_deep_unlearning", 4),
    ]
