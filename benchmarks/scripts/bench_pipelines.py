"""Pipelines that people have, before and after: the same training as they write it, and on this engine. FLOPs are
counted by torch, and the trained weights are compared; nothing is timed.

    python benchmarks/scripts/bench_pipelines.py             # all, SmolLM2-135M's shapes, minutes on a CPU
    python benchmarks/scripts/bench_pipelines.py --only trainer --csv benchmarks/results/pipelines_cpu.csv

trainer: re-insertion of the two densest blocks of three layers. Before: a Hugging Face Trainer for each block, whose
compute_loss is -model(**forget).loss + model(**retain).loss, all else frozen. After: KUnBRTrainer. The first one is
given the blocks that the second one measured; that measurement is in the second one's FLOPs.
authors: the authors' DEEP_UNL, which trains two whole models in turn (tests/authors_class.py tells it
plainly), and ours, over a stand-in for the Base_model that they did not publish; six visits of layers 0 to 23, a
letter's loss. corpus: the same with a mean over the whole padded grid, as RTT's authors have for text lines.
"""

import copy
import functools
import random
import sys
import tempfile

import torch
import transformers as tf

from kunbr_fast.benchmarks.measure import add_rows, script_parser
from kunbr_fast.benchmarks.shapes import MODELS
from kunbr_fast.checkout import ROOT
from kunbr_fast.model.flops import flop_counter

sys.path.insert(0, str(ROOT / "tests"))

import authors_class as plain  # noqa: E402

import kunbr_fast as kf  # noqa: E402
from kunbr_fast.data.schedule import Schedule  # noqa: E402
from kunbr_fast.integrations import KUnBRTrainer  # noqa: E402
from kunbr_fast.integrations.deep_unl import DEEP_UNL  # noqa: E402
from kunbr_fast.kernels.optimizers.op import Lion  # noqa: E402

LR, BATCH, EPOCHS, COUNT = 1e-5, 6, 2, 12


def build(layers):
    shape = MODELS["SmolLM2-135M"]
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=layers, num_attention_heads=shape.heads, num_key_value_heads=shape.key_value_heads,
        tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config).eval()


def samples(count, seed):
    """Lengths as in Random Birthdays (32 to 60 tokens); the last four have a loss."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        ids = torch.randint(3, 49000, (int(torch.randint(32, 61, (), generator=generator)),), generator=generator)
        labels = torch.full_like(ids, -100)
        labels[-4:] = ids[-4:]
        out.append({"input_ids": ids, "labels": labels})
    return out


def flops(run):
    with flop_counter() as counter:
        result = run()
    return counter.get_total_flops(), result


def compare(before, after, start):
    """How many entries training moved, and how many differ between the two."""
    moved, differ = (sum(int((v != other[n]).sum()) for n, v in before.items()) for other in (start, after))
    return dict(entries_moved=moved, entries_that_differ=differ)


# ---------------------------------------------------------------- Hugging Face's Trainer


class GradDiff(tf.Trainer):
    def compute_loss(self, model, inputs, **kwargs):
        return -model(**inputs["forget"]).loss + model(**inputs["retain"]).loss


class Steps(torch.utils.data.Dataset):
    """Item i: the padded batches of step i."""

    def __init__(self, schedule, forget, retain):
        self.schedule, self.data = schedule, (forget, retain)

    def __len__(self):
        return len(self.schedule)

    def __getitem__(self, i):
        forget, retain = ([data[k] for k in part] for data, part in zip(self.data, self.schedule[i]))
        return {"forget": _padded(forget), "retain": _padded(retain)}


def _padded(part):
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([s["input_ids"] for s in part], True, 0),
        "labels": pad([s["labels"] for s in part], True, -100),
        "attention_mask": pad([torch.ones_like(s["input_ids"]) for s in part], True, 0),
    }


def trainer(folder):
    model = build(30)
    start = {n: p.detach() + 1e-3 * torch.randn_like(p) for n, p in model.named_parameters()}
    forget, retain = samples(COUNT, 1), samples(COUNT, 2)
    common = dict(
        per_device_train_batch_size=BATCH, lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True,
        save_strategy="no", disable_tqdm=True, report_to=[], logging_steps=1000,
    )  # fmt: skip
    config = kf.KUnBRConfig(num_blocks=10, top_k=2, block_epochs=EPOCHS, block_lr=LR, max_retain_loss=1e9)
    original = copy.deepcopy(model)
    ours = KUnBRTrainer(
        model, tf.TrainingArguments(f"{folder}/after", **common), config=config, forget_dataset=forget,
        retain_dataset=retain, unlearned=start,
    )  # fmt: skip
    after, _ = flops(ours.train)
    result = {name: p.detach() for name, p in model.named_parameters()}
    changed = sorted({int(n.split(".")[2]) for n, p in result.items() if "layers" in n and not p.equal(start[n])})
    blocks = [range(first, first + 3) for first in changed[::3]]

    def each_block():
        merged = dict(start)
        own = dict(original.named_parameters())
        for number, block in enumerate(blocks, 1):
            names = [n for n in own if any(n.startswith(f"model.layers.{i}.") for i in block)]
            kept = {n: own[n].detach().clone() for n in names}
            with torch.no_grad():
                for name in names:
                    own[name].copy_(start[name])
            for name, p in own.items():
                p.requires_grad_(name in names)
            settings = {**common, "per_device_train_batch_size": 1, "num_train_epochs": 1}
            settings |= dict(remove_unused_columns=False, train_sampling_strategy="sequential")
            GradDiff(
                original,
                tf.TrainingArguments(f"{folder}/before", **settings),
                train_dataset=Steps(Schedule(COUNT, COUNT, BATCH, BATCH, EPOCHS, number), forget, retain),
                data_collator=lambda items: items[0],
                optimizers=(Lion([own[n] for n in names], lr=LR), None),
            ).train()
            with torch.no_grad():
                for name in names:
                    merged[name] = own[name].detach().clone()
                    own[name].copy_(kept[name])
        return merged

    before, merged = flops(each_block)
    where = ", ".join(f"{b.start}-{b.stop - 1}" for b in blocks)
    return dict(blocks=where, before=before, after=after, **compare(merged, result, start))


# ---------------------------------------------------------------- the authors' script


def authors(folder, get_loss=plain.letter):
    original = build(24)
    start = {name: p + 1e-3 * torch.randn_like(p) for name, p in original.state_dict().items()}
    bases = []
    for _ in range(2):
        model = copy.deepcopy(original)
        model.load_state_dict(start)
        base = plain.StandIn(model, original, get_loss, batch_size=BATCH, eval_every=100)
        base.lr, base.retain_coeff = LR, 1.0
        base.val_forget_dataset, base.val_retain_dataset = samples(COUNT, 1), samples(COUNT, 2)
        base.eval = base.eval_on_RTV = lambda *args, **kwargs: None  # equal on both sides, and no part of the training
        bases.append(base)
    settings = dict(block_num=6, choose_num=1, compare_train_times=1, num_layers=24)
    before, _ = flops(lambda: (random.seed(3), plain.published(bases[0], 6, **settings)))
    ours = DEEP_UNL(bases[1], compare_model_path="elsewhere", **settings)
    after, _ = flops(lambda: (random.seed(3), ours.dynamic_deep_unlearning(6)))
    found = [dict(base.model.named_parameters()) for base in bases]
    where = "0-3, 4-7, 8-11, 12-15, 16-19, 20-23"
    return dict(blocks=where, before=before, after=after, **compare(*found, start))


PIPELINES = {
    "trainer": trainer,
    "authors": authors,
    "corpus": functools.partial(authors, get_loss=plain.every_place),
}


def main():
    parser = script_parser(__doc__)
    parser.add_argument("--only", choices=list(PIPELINES), help="one of them [all]")
    arguments = parser.parse_args()
    tf.utils.logging.set_verbosity_error()
    rows = []
    for name in [arguments.only] if arguments.only else PIPELINES:
        with tempfile.TemporaryDirectory() as folder:
            found = PIPELINES[name](folder)
        before, after = found.pop("before"), found.pop("after")
        rows.append(
            dict(benchmark="pipelines", pipeline=name, before_tflop=round(before / 1e12, 3),
                 after_tflop=round(after / 1e12, 3), **found)
        )  # fmt: skip
        print(rows[-1], flush=True)
        if found["entries_that_differ"] > 1e-4 * found["entries_moved"]:
            sys.exit("more than one entry in 10000 differs: not the same training, no numbers")
    add_rows(arguments.csv, rows)


if __name__ == "__main__":
    main()
