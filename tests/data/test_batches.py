"""No part of a batch is ignored: what tells samples apart is taken for it, what says nothing is let through, and every
other key is refused by name."""

import itertools

import pytest
import tiny_text
import torch
import transformers as tf

import kunbr_fast as kf
from kunbr_fast.data import as_samples, pack, with_alternates
from kunbr_fast.integrations import labelled_rows, recognise, trainer_data
from kunbr_fast.run.samples import entries

LENGTHS = (9, 7, 1, 12, 5)


def samples_of(lengths, seed=0, prompt=0):
    """Random tokens, of which the first `prompt` have no label."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for n in lengths:
        ids = torch.randint(4, 90, (n,), generator=g)
        labels = ids.clone()
        labels[: min(prompt, n - 2) if n > 2 else 0] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def same(found, wanted):
    assert [s["input_ids"].tolist() for s in found] == [s["input_ids"].tolist() for s in wanted]
    # a first token is predicted by nothing
    assert [s["labels"][1:].tolist() for s in found] == [s["labels"][1:].tolist() for s in wanted]


def row(samples, *names, padding=0, numbers=None):
    """One row of samples end to end, with what `names` tell of it."""
    lengths = [len(s["input_ids"]) for s in samples]
    cat = lambda key: torch.cat([s[key] for s in samples] + [torch.zeros(padding, dtype=torch.long)])  # noqa: E731
    found = {"input_ids": cat("input_ids"), "labels": cat("labels")}
    if padding:
        found["labels"][-padding:] = -100
    zeros = [torch.zeros(1, dtype=torch.long)] * padding
    number = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)] + zeros)
    told = {
        "position_ids": torch.cat([torch.arange(n) for n in lengths] + zeros),
        "attention_mask": torch.where(torch.arange(len(number)) < sum(lengths), number + 1, 0),
        "seq_idx": number,
    }
    found |= {name: told[name] for name in names if name in told}
    found = {name: value[None] for name, value in found.items()}
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    found |= {name: offsets for name in names if name.startswith("cu_seq")}
    return found | {name: max(lengths) for name in names if name.startswith("max")}


# ---------------------------------------------------------------- samples end to end


@pytest.mark.parametrize("options", [
    {}, {"return_seq_idx": True}, {"return_flash_attn_kwargs": True},
    {"return_flash_attn_kwargs": True, "return_seq_idx": True},
    {"return_position_ids": False, "return_seq_idx": True},
    {"return_position_ids": False, "return_flash_attn_kwargs": True},
])  # fmt: skip
@pytest.mark.parametrize("prompt", [0, 3])
@pytest.mark.parametrize("kind", ["pt", "np", "lists"])
def test_flattened_by_transformers(options, prompt, kind):
    wanted = samples_of(LENGTHS, prompt=prompt)
    collator = tf.DataCollatorWithFlattening(return_tensors="np" if kind == "np" else "pt", **options)
    batch = collator([{k: v.tolist() for k, v in s.items()} for s in wanted])
    if kind == "lists":
        batch = tf.BatchEncoding({k: v.tolist() if hasattr(v, "tolist") else v for k, v in batch.items()})
    same(as_samples(batch), wanted)
    same(as_samples([wanted[0], batch]), [wanted[0], *wanted])


TELLING = ("position_ids", "attention_mask", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")


@pytest.mark.parametrize("names", [c for n in (1, 2, 5) for c in itertools.combinations(TELLING, n)], ids=" ".join)
def test_each_that_tells_samples_apart(names):
    wanted = samples_of(LENGTHS, 1)
    same(as_samples(row(wanted, *names)), wanted)
    one = {k: v[0] if v.dim() == 2 else v for k, v in row(wanted, *names).items()}  # a sample of its own, (T,)
    same(as_samples([one]), wanted)


def test_rows_of_several_samples():
    """Multipack: each row has samples of its own, and padding."""
    parts = [samples_of((4, 3), 2), samples_of((6,), 3), samples_of((2, 2, 2), 4)]
    rows = [row(part, "attention_mask", "position_ids", padding=8 - sum(len(s["input_ids"]) for s in part))
            for part in parts]  # fmt: skip
    batch = {name: torch.cat([r[name] for r in rows]) for name in rows[0]}
    same(as_samples(batch), [s for part in parts for s in part])
    same(as_samples({k: v.flip(0) for k, v in batch.items()}), [s for part in parts[::-1] for s in part])


@pytest.mark.parametrize("padding", [1, 3])
def test_padding_behind_a_flattened_row(padding):
    wanted = samples_of((4, 3), 5)
    same(as_samples(row(wanted, "position_ids", padding=padding)), wanted)
    same(as_samples(row(wanted, "attention_mask", padding=padding)), wanted)


def test_rows_with_a_label_are_those_of_the_samples():
    wanted = samples_of((9, 7, 5), 6, 2)
    flat = tf.DataCollatorWithFlattening()([{k: v.tolist() for k, v in s.items()} for s in wanted])
    ours, theirs = pack(as_samples(flat)), pack(wanted)
    assert ours.lengths == [9, 7, 5] and torch.equal(ours.position_ids, theirs.position_ids)
    assert torch.equal(ours.rows, theirs.rows) and torch.equal(ours.targets, theirs.targets)


T = torch.tensor
BASE = {"input_ids": T([[5, 6, 7, 8, 9, 10]]), "labels": T([[5, 6, 7, 8, 9, 10]])}
UNCLEAR = {  # a batch's more, and what the message says
    "positions from 5": ({"position_ids": T([[5, 6, 7, 8, 9, 10]])}, "neither count the tokens from 0"),
    "restarts at 2": ({"position_ids": T([[0, 1, 2, 2, 3, 4]])}, "neither count the tokens from 0"),
    "positions by two": ({"position_ids": T([[0, 2, 4, 6, 8, 10]])}, "neither count the tokens from 0"),
    "positions of three axes": ({"position_ids": torch.zeros(3, 1, 6).long()}, r"position_ids \(3, 1, 6\)"),
    "positions of floats": ({"position_ids": torch.zeros(1, 6)}, "position_ids of float32"),
    "numbers from 2": ({"attention_mask": T([[2, 2, 3, 3, 4, 4]])}, "does not number samples"),
    "numbers that jump": ({"attention_mask": T([[1, 1, 3, 3, 4, 4]])}, "does not number samples"),
    "numbers that come again": ({"attention_mask": T([[1, 1, 2, 2, 1, 1]])}, "does not number samples"),
    "numbers with a hole": ({"attention_mask": T([[1, 1, 0, 2, 2, 2]])}, "has a hole"),
    "bytes": ({"attention_mask": T([[255, 255, 255, 0, 0, 0]])}, "does not number samples"),
    "an additive mask": ({"attention_mask": T([[0, 0, 0, 0, -1e9, -1e9]])}, "other values than 0 and 1"),
    "halves": ({"attention_mask": T([[0.5, 1, 1, 1, 1, 1]])}, "other values than 0 and 1"),
    "pairs": ({"attention_mask": torch.ones(1, 1, 6, 6)}, "a mask of token pairs is not read"),
    "pairs of one": ({"attention_mask": torch.ones(6, 6)}, "a mask of token pairs is not read"),
    "seq_idx goes back": ({"seq_idx": T([[0, 0, 1, 1, 0, 0]])}, "seq_idx .* goes back"),
    "offsets too short": ({"cu_seq_lens_q": T([0, 3, 5])}, "cu_seq_lens_q .* does not divide"),
    "offsets back": ({"cu_seq_lens_k": T([0, 4, 3, 6])}, "cu_seq_lens_k .* does not divide"),
    "no offsets": ({"cu_seq_lens_q": T([6])}, "does not divide"),
    "two that disagree": (
        {"position_ids": T([[0, 1, 2, 0, 1, 2]]), "seq_idx": T([[0, 0, 1, 1, 1, 1]])}, "do not tell the same"),
    "offsets that disagree": ({"cu_seq_lens_q": T([0, 3, 6]), "cu_seq_lens_k": T([0, 2, 6])}, "do not tell the same"),
    "a mask alone numbers": (
        {"attention_mask": T([[1, 1, 2, 2, 2, 2]]), "position_ids": T([[0, 1, 2, 3, 4, 5]])}, "do not tell the same"),
    "a longest that is too short": ({"max_length_q": 3}, "max_length_q=3, but a sample has 6"),
    "token types": ({"token_type_ids": T([[0, 0, 0, 1, 1, 1]])}, "token_type_ids are not 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_does_not_tell_samples_apart(name):
    more, message = UNCLEAR[name]
    with pytest.raises(ValueError, match=f"^sample 1: .*{message}") as error:
        as_samples([BASE, {**BASE, **more}])
    assert len(str(error.value)) < 300 and str(error.value).isprintable()


# ---------------------------------------------------------------- padding


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("of_padding", [0, 1, None])
def test_positions_of_padding(side, of_padding):
    """As generation makes them, cumsum(mask) - 1, with something at the padding; or the row's own count (None)."""
    wanted = samples_of((3, 5, 2), 7)
    batch = {name: torch.zeros(3, 5, dtype=torch.long) for name in ("input_ids", "labels", "attention_mask")}
    for i, sample in enumerate(wanted):
        n = len(sample["input_ids"])
        here = slice(5 - n, 5) if side == "left" else slice(0, n)
        for name, value in (*sample.items(), ("attention_mask", 1)):
            batch[name][i, here] = value
    mask = batch["attention_mask"]
    positions = (
        torch.arange(5)[None] if of_padding is None else (mask.cumsum(-1) - 1).masked_fill(mask == 0, of_padding)
    )
    same(as_samples({**batch, "position_ids": positions}), wanted)
    same(as_samples({**batch, "attention_mask": mask.bool(), "position_ids": positions}), wanted)
    same(as_samples({**batch, "attention_mask": mask.double().numpy()}), wanted)


def test_rows_as_a_list_of_tensors():
    rows = [T([1, 2, 3]), T([4, 5, 6])]
    assert [s["labels"].tolist() for s in as_samples({"input_ids": rows, "labels": rows})] == [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(ValueError, match="^sample 0: row 1 of input_ids has 2 tokens, row 0 has 3"):
        as_samples({"input_ids": [rows[0], rows[1][:2]]})


def test_ragged_batches_are_named():
    ragged = {"input_ids": [[1, 2], [3, 4], [5]]}
    for batch in (ragged, tf.BatchEncoding(ragged), {"input_ids": ((1, 2), (1, 2), [1])}):
        with pytest.raises(ValueError, match="^sample 0: row 2 of input_ids has 1 tokens, row 0 has 2: pad them"):
            as_samples(batch)
    with pytest.raises(ValueError, match="^sample 0: row 1 of labels has 3"):
        as_samples({"input_ids": [[1, 2], [3, 4]], "labels": [[1, 2], [3, 4, 5]]})


ODD = {
    "nested": {"input_ids": torch.nested.nested_tensor([T([1, 2]), T([3])], layout=torch.jagged)},
    "sparse": {"input_ids": T([[1, 0], [2, 3]]).to_sparse()}, "a set": {"input_ids": {1, 2}},
    "a mask in a dict": {**BASE, "attention_mask": {"full": T([1])}},
    "a ragged mask": {"input_ids": [[1, 2], [3, 4]], "attention_mask": [[1, 1], [1]]},
    "a complex mask": {**BASE, "attention_mask": T([[1j, 1, 1, 1, 1, 1]])},
    "types of text": {**BASE, "token_type_ids": "a"},
    "a loss mask of objects": {**BASE, "loss_mask": object()}, "a longest of text": {**BASE, "max_length_q": ["a", 1]},
    "a mask without values": {**BASE, "attention_mask": torch.ones(1, 6, device="meta")},
    "no offset": {**BASE, "cu_seq_lens_q": []}, "no position": {**BASE, "position_ids": T([]).long()},
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_values_are_named(name):
    with pytest.raises(ValueError, match="^sample 0: ") as error:
        as_samples(ODD[name])
    assert len(str(error.value)) < 250 and str(error.value).isprintable()


# ---------------------------------------------------------------- all other keys

REFUSED = {
    "weights": [1.0], "num_items_in_batch": T(5), "inputs_embeds": torch.ones(1, 6, 4), "pixel_values": torch.ones(2),
    "cache_position": torch.arange(6), "past_key_values": [(torch.ones(1),)],
    "shift_labels": BASE["labels"], "cu_seqlens": T([0, 6]),
    "decoder_input_ids": BASE["input_ids"], "global_attention_mask": torch.ones(1, 6), "prompt_length": 3,
    "logits": torch.ones(1), 5: 1, "Position_ids": T([[0]]),
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_keys_that_would_not_be_used(key):
    with pytest.raises(ValueError, match=f"^sample 1: '?{key}'? would not be used: ") as error:
        as_samples([BASE, {**BASE, key: REFUSED[key]}])
    assert len(str(error.value)) < 250
    as_samples([{**BASE, key: None}])


@pytest.mark.parametrize("keys, cure", [
    ("seq_lengths sequence_id segment_ids document_ids docIds pack_lens block_mask cu_seqs", "give position_ids that"),
    ("prompt_length source_len response_mask lossWeight target_start", "give labels of -100 where there is none"),
    ("embedding 3 x", "leave it out, or begin its name with _"),
])  # fmt: skip
def test_what_a_key_may_say_is_not_lost(keys, cure):
    """Leaving it out would make one sample of a packed row, or put a loss on a prompt."""
    for key in keys.split():
        with pytest.raises(ValueError, match=f"^sample 0: '{key}' would not be used: .*{cure}"):
            as_samples({**BASE, key: T([[1, 1, 1, 2, 2, 2]])})
    for length in ([3, 3], T([[3, 3]])):
        with pytest.raises(ValueError, match="^sample 0: length of 2 samples in 1 row: give position_ids"):
            as_samples({**BASE, "length": length})


def test_each_item_has_as_many_alternates_as_samples():
    packed = {**BASE, "position_ids": T([[0, 1, 2, 0, 1, 2]])}
    assert list(map(len, with_alternates([{**packed, "alternate": packed}]))) == [2, 2]
    with pytest.raises(ValueError, match="^sample 0: it holds 2 and its alternate 1: expected one"):
        with_alternates([{**packed, "alternate": BASE}, {**BASE, "alternate": packed}])


def test_keys_that_say_nothing():
    harmless = {
        "special_tokens_mask": torch.zeros(1, 6), "length": [6], "index": T([3]),
        "offset_mapping": torch.zeros(1, 6, 2),
        "token_type_ids": torch.zeros(1, 6, dtype=torch.long), "text": "what the tokens are", "prompts": ["a", "b"],
        "messages": [[{"role": "user", "content": [{"type": "text", "text": "x"}]}]], "choices": [1, 2], "answer": 0,
        "_mine": object(), "past_key_values": None, "max_length_q": 6,
    }  # fmt: skip
    same(as_samples({**BASE, **harmless}), as_samples(BASE))


@pytest.mark.parametrize("key", ["loss_mask", "completion_mask", "assistant_masks"])
def test_masks_of_the_loss(key):
    labels = T([[-100, -100, 7, 8, -100, 10]])
    batch = {**BASE, "labels": labels, key: T([[0, 0, 1, 1, 0, 1]])}
    assert as_samples(batch)[0]["labels"].tolist() == labels[0].tolist()
    with pytest.raises(ValueError, match=f"^sample 0: {key} has other values than 0 and 1: .*give labels of -100"):
        as_samples({**batch, key: T([[0, 0, 0.1, 0.5, 0, 1]])})
    for other in (T([[0, 0, 1, 1, 1, 1]]), T([[0, 0, 1, 1]]), T([[0, 0, 0, 1, 0, 1]])):
        with pytest.raises(ValueError, match=f"^sample 0: {key} would not be used, and the labels say another thing"):
            as_samples({**batch, key: other})


def test_beside_an_original_and_its_alternate():
    pair = {"original": BASE, "alternate": BASE}
    assert len(with_alternates([{**pair, "index": 3}])[1]) == 1
    with pytest.raises(ValueError, match="^sample 1: 'weights' would not be used"):
        with_alternates([pair, {**pair, "weights": [1.0]}])
    with pytest.raises(ValueError, match="^sample 0: 'pixel_values' would not be used"):
        with_alternates([{"original": BASE, "alternate": {**BASE, "pixel_values": T([1])}}])


# ---------------------------------------------------------------- labels


def shifted(ids, labels, cut):
    """As tools have them that shift by themselves; cut: the last token has no row."""
    after = torch.cat([labels[1:], T([-100])])
    return {"input_ids": ids[:-1], "labels": after[:-1]} if cut else {"input_ids": ids, "labels": after}


@pytest.mark.parametrize("prompt", [0, 4])
@pytest.mark.parametrize("cut", [False, True])
def test_labels_that_are_shifted_already(cut, prompt):
    good = samples_of((9, 7, 12, 5), 8, prompt)
    bad = [shifted(s["input_ids"], s["labels"], cut) for s in good]
    for data in (bad, bad[:1], [{k: v[None] for k, v in s.items()} for s in bad]):
        with pytest.raises(ValueError, match="^sample 0: its labels are shifted already"):
            as_samples(data)
    assert len(as_samples(good)) == 4


def test_labels_that_are_not():
    """Repeated tokens, another answer, one label alone, and a letter where the next token happens to be it."""
    ids = T([5, 5, 5, 5, 6])
    right = [
        {"input_ids": ids[:4], "labels": ids[:4]}, {"input_ids": ids, "labels": T([-100, -100, 5, 5, -100])},
        {"input_ids": ids, "labels": T([-100, -100, -100, 6, -100])}, {"input_ids": T([3]), "labels": T([3])},
        {"input_ids": T([1, 2, 3, 4]), "labels": T([-100, 7, 8, 9])},
        {"input_ids": T([1, 2, 3, 4]), "labels": T([-100, -100, -100, 4])},
    ]  # fmt: skip
    for data in (*([one] for one in right), right):
        assert len(as_samples(data)) == len(data)


def test_labels_outside_of_the_vocabulary_at_every_entry():
    model = tiny_text.model()
    size = model.get_input_embeddings().weight.shape[0]
    good = {"input_ids": T([1, 2, 3]), "labels": T([-100, 2, 3])}
    bad = {**good, "labels": T([-100, 2, size])}
    message = f"label id {size}, but the model embeds {size}"
    config = kf.KUnBRConfig(num_blocks=2, top_k=1, skip_last_layers=1)
    entries = (
        lambda: kf.knowledge_density(model, [good, bad]),
        lambda: kf.unlearn(model, [bad], [good], config),
        lambda: kf.unlearn(model, [good], [{k: v[None] for k, v in bad.items()}], config),
    )
    for entry in entries:
        with pytest.raises(ValueError, match=message):
            entry()
    with (
        kf.reinserted(model, dict(model.named_parameters()), range(1), lr=1e-3) as training,
        pytest.raises(ValueError, match=message),
    ):
        training.step([bad], [good])


# ---------------------------------------------------------------- whole sets


def test_what_a_set_may_be():
    sample, batch = samples_of((4,), 9)[0], BASE
    loader = torch.utils.data.DataLoader([sample, sample], batch_size=2)
    for data, count in ((batch, 1), ([sample], 1), (iter([sample, batch]), 2), (loader, 1), ((), 0)):
        assert len(entries(data, "forget")) == count
    for data, message in (("f.jsonl", "load_records reads files"), (None, "got None"), (3, "got 3")):
        with pytest.raises(ValueError, match=f"^the forget set: .*{message}"):
            entries(data, "forget")


# ---------------------------------------------------------------- integrations


def test_one_of_each_different_sample():
    """Of a data set of pairs: the same tokens with another mask, or another alternate, are another sample."""
    masked = {**BASE, "attention_mask": T([[0, 1, 1, 1, 1, 1]])}
    pairs = [{"forget": BASE, "retain": BASE}, {"forget": masked, "retain": BASE}]
    pairs += [{"forget": {"original": BASE, "alternate": other}, "retain": masked} for other in (BASE, masked)] * 2
    forget, retain = trainer_data._apart(pairs, None)
    assert [len(forget), len(retain)] == [4, 2]
    with pytest.raises(ValueError, match=r"^train_dataset\[1\]: 'weights' would not be used"):
        trainer_data._apart([pairs[0], {**pairs[1], "weights": 1}], None)
    with pytest.raises(ValueError, match="^sample 0: 'weights' would not be used"):
        trainer_data._apart([{"forget": {"original": BASE, "alternate": BASE, "weights": 1}, "retain": BASE}], None)


def test_a_reference_model_is_asked_again_where_anything_differs():
    inputs = {**BASE, "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    first = labelled_rows._keys(inputs)
    assert first == labelled_rows._keys({**inputs, "use_cache": False})
    for more in ({"position_ids": torch.arange(6)[None] + 1}, {"token_type_ids": T([[0, 0, 0, 1, 1, 1]])}):
        assert labelled_rows._keys({**inputs, **more}) != first


def test_a_mask_of_numbers_is_left_to_the_models_own_pass():
    ids = BASE["input_ids"]
    assert recognise._inputs((), {"input_ids": ids, "attention_mask": T([[1, 1, 1, 1, 0, 0]])}) is not None
    assert recognise._inputs((), {"input_ids": ids, "attention_mask": T([[1, 1, 2, 2, 0, 0]])}) is None
