"""TRL's DPOTrainer trains one block of a model's layers, or LoRA adapters in it. No network: a tiny random model.

    pip install 'kunbr-fast[examples]'
    python examples/trl_dpo.py

`with kf.patched(model, active_block=...)` around `trainer.train()` is all. The reference model is a copy of the model;
with LoRA it is the model without its adapters, so it runs fused layers too. Each way is compared with the same training
of the block without it, the other layers frozen by hand: exit status 1 where the trained weights differ. Adapters must
be in the block's layers alone, as there: TRL switches them off and on for the reference, and on means all of them.
"""

import contextlib
import copy
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

import kunbr_fast as kf
from kunbr_fast.model.flops import flop_counter

BLOCK, STEPS = range(4, 6), 2
TARGETS = ["q_proj", "v_proj", "down_proj"]
DATA = [
    {"prompt": f"When was {x} born ?", "chosen": " I do not know", "rejected": f" {x} was born in 19{i}5"}
    for i, x in enumerate("ABCDEFGH")
]


def tokenizer() -> PreTrainedTokenizerFast:
    words = sorted({word for row in DATA for text in row.values() for word in text.split()})
    known = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(known, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def train(what: str, patch: bool, lora: bool, precompute: bool) -> tuple[torch.Tensor, float]:
    """How far training moved the weights, and MFLOPs of a step. what: the whole "model" is trained, or the "block"."""
    layers = list(BLOCK) if what == "block" else None
    adapters = LoraConfig(r=4, target_modules=TARGETS, layers_to_transform=layers) if lora else None
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=8, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    reference = None if lora else copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            folder, max_steps=STEPS, per_device_train_batch_size=4, learning_rate=0.1, optim="sgd", report_to="none",
            save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False, precompute_ref_log_probs=precompute,
        )  # fmt: skip
        trainer = DPOTrainer(
            model, reference, args, train_dataset=Dataset.from_list(DATA), processing_class=tokenizer(),
            peft_config=adapters,
        )  # fmt: skip
        model = trainer.model
        if what == "block" and not patch and not lora:  # by hand
            model.requires_grad_(False)
            model.model.layers[BLOCK.start : BLOCK.stop].requires_grad_(True)
        start = torch.cat([p.detach().flatten() for p in model.parameters()])
        around = kf.patched(model, active_block=BLOCK) if patch else contextlib.nullcontext()
        with around, flop_counter() as counter:
            trainer.train()
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - start
    return moved, counter.get_total_flops() / STEPS / 1e6


CASES = (
    ("DPOTrainer", False, False),
    ("DPOTrainer, precomputed", False, True),
    ("DPOTrainer with LoRA", True, False),
)


def main() -> None:
    for name, *how in CASES:
        _, whole = train("model", False, *how)
        truth, before = train("block", False, *how)
        ours, after = train("block", True, *how)
        apart = float((ours - truth).norm() / truth.norm())
        print(
            f"{name}: MFLOP of a step: {whole:.1f} whole model, {before:.1f} block, {after:.1f} block patched, "
            f"ratio {after / whole:.3f} to the model and {after / before:.3f} to the block; weights apart {apart:.0e}",
            flush=True,
        )
        if not apart < 1e-4:
            raise SystemExit(f"{name}: weights differ by {apart:.1e} of their way")


if __name__ == "__main__":
    main()
