"""Lightning: a module whose training runs fused layers (`kf.patched`), and one whose steps are `kf.reinserted`'s.

    pip install 'kunbr-fast[examples]'
    python examples/lightning_module.py

No network, no GPU: a tiny random model. Both are compared with a plain LightningModule of the same optimiser and data,
where all but the block was frozen by hand: exit status 1 where the trained weights differ.
"""

import contextlib
import copy
import logging
import warnings

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import kunbr_fast as kf
from kunbr_fast.model.flops import flop_counter

BLOCK, STEPS, LR = range(4, 6), 3, 1e-3


class Difference(lightning.LightningModule):
    """Gradient difference, as anybody would write it."""

    def __init__(self, model: LlamaForCausalLM):
        super().__init__()
        self.model = model

    def training_step(self, batch: dict, _: int) -> torch.Tensor:
        return self.model(**batch["retain"]).loss - self.model(**batch["forget"]).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)


class Reinserted(lightning.LightningModule):
    """Its steps are kf.reinserted's, which holds the optimiser: Lightning brings batches, loggers and callbacks."""

    def __init__(self, training: object):
        super().__init__()
        self.training_of_the_block, self.automatic_optimization = training, False

    def training_step(self, batch: dict, _: int) -> None:
        self.log_dict(self.training_of_the_block.step(batch["forget"], batch["retain"]))

    def configure_optimizers(self) -> None:
        return None


def batches() -> list[dict]:
    """6 questions to forget and 6 to retain a step; only answers have labels."""
    draw, found = torch.Generator().manual_seed(0), []
    for _ in range(STEPS):
        batch = {}
        for part in ("forget", "retain"):
            ids = torch.randint(3, 256, (6, 24), generator=draw)
            labels = torch.where(torch.arange(24) >= 18, ids, -100)
            batch[part] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        found.append(batch)
    return found


def fit(module: lightning.LightningModule, around: contextlib.AbstractContextManager) -> float:
    """MFLOPs of a step."""
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    with around, flop_counter() as counter:
        trainer.fit(module, DataLoader(batches(), batch_size=None))
    return counter.get_total_flops() / STEPS / 1e6


def main() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    start = LlamaForCausalLM(config).train()

    def moved(model: LlamaForCausalLM) -> torch.Tensor:
        return torch.cat([(p - q).detach().flatten() for p, q in zip(model.parameters(), start.parameters())])

    whole = fit(Difference(copy.deepcopy(start)), contextlib.nullcontext())
    plain = copy.deepcopy(start).requires_grad_(False)
    plain.model.layers[BLOCK.start : BLOCK.stop].requires_grad_(True)
    before = fit(Difference(plain), contextlib.nullcontext())
    truth, found = moved(plain), {}
    model = copy.deepcopy(start)
    found["kf.patched"] = fit(Difference(model), kf.patched(model, active_block=BLOCK)), moved(model)
    model = copy.deepcopy(start)  # the block goes back into it; here the original is the same
    with kf.reinserted(start, model, BLOCK, lr=LR, optimizer="adamw") as training:
        after = fit(Reinserted(training), contextlib.nullcontext())
    found["kf.reinserted"] = after, moved(model)
    for name, (after, ours) in found.items():
        apart = float((ours - truth).norm() / truth.norm())
        print(
            f"Lightning, {name}: MFLOP of a step: {whole:.1f} whole model, {before:.1f} block, {after:.1f} block "
            f"patched, ratio {after / whole:.3f} to the model and {after / before:.3f} to the block; "
            f"weights apart {apart:.0e}"
        )
        if not apart < 1e-3:
            raise SystemExit(f"{name}: weights differ by {apart:.1e} of their way")


if __name__ == "__main__":
    main()
