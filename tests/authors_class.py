"""The authors' class as they published it, plainly, over a stand-in for the Base_model that they did not publish."""

import copy
import random

import torch
import torch.nn.functional as F
from reference_procedure import ReferenceLion, block_names, left_padded, padded_loss, swap
from tiny_models import random_samples

from kunbr_fast.model.decoder import Decoder

LR, RETAIN_COEFF = 1e-3, 1.5


def positions_of(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def letter(batch, model):
    """The next token after the last one, left-padded; what is no choice is struck out, in place, after the loss."""
    ids, mask, _ = left_padded([{k: v[:-1] for k, v in point.items()} for point in batch])
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask)).logits[:, -1, :]
    loss = F.cross_entropy(logits, torch.stack([point["input_ids"][-1] for point in batch]))
    logits[:, 4:] = -float("inf")
    return loss


def every_place(batch, model):
    """A mean over the whole left-padded grid, padding too."""
    ids, mask, _ = left_padded(batch)
    logits = model(input_ids=ids, attention_mask=mask).logits
    return -logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).mean()


class StandIn:
    """The surface of the authors' Base_model that their class uses."""

    def __init__(self, model, original, get_loss, batch_size=4, eval_every=2, epochs=3):
        self.model, self.original, self.loss = model, original, get_loss
        self.lr, self.retain_coeff, self.warmup_steps = LR, RETAIN_COEFF, 24
        self.batch_size, self.eval_every, self.epochs = batch_size, eval_every, epochs
        self.val_forget_dataset, self.val_retain_dataset = random_samples(9, 1), random_samples(14, 2)
        self.calls = []

    def load_llm(self, path):
        assert path == "elsewhere"
        return copy.deepcopy(self.original)

    def get_loss(self, batch, model):
        return self.loss(batch, model)

    @torch.no_grad()
    def eval(self, time, dataset, task_name, model):
        model.eval()
        value = float(padded_loss(model, dataset))
        model.generate(dataset[0]["input_ids"][None], max_new_tokens=3, do_sample=False, pad_token_id=0)
        random.random()  # a draw between those of the training
        model.train()
        self.calls.append((task_name, time, value))
        return value

    @torch.no_grad()
    def eval_on_RTV(self, time, name):
        self.calls.append((name, time, float(padded_loss(self.model, self.val_forget_dataset))))


def published(base, epochs, block_num=3, choose_num=1, compare_train_times=1, num_layers=6):
    """The authors' procedure, plainly: two models, get_loss on each of two padded passes, a new Lion at each visit."""
    compare = base.load_llm("elsewhere")
    layers_path = Decoder(compare).layer_path(0).rpartition(".")[0]
    visits = [0] * block_num
    base.eval_on_RTV(0, "dynamic_GD_deep_unlearning")
    for epoch in range(epochs):
        chosen = [i for i in range(block_num) if visits[i] < compare_train_times][:choose_num] or range(block_num)
        size = num_layers // block_num
        names = []
        for i in chosen:
            visits[i] += 1
            names += block_names(compare, layers_path, range(i * size, (i + 1) * size))
        cut = lambda points: [points[k : k + base.batch_size] for k in range(0, len(points), base.batch_size)]  # noqa: E731
        forget, retain = cut(base.val_forget_dataset), cut(base.val_retain_dataset)
        swap(base.model, compare, names)
        for name, parameter in compare.named_parameters():
            parameter.requires_grad_(name in names)
        optimizer = ReferenceLion(compare.parameters(), base.lr)
        base.eval(time=epoch, dataset=base.val_forget_dataset, task_name="eval on compare_model", model=compare)
        compare.eval()  # no dropout in these models: as good as train()
        for i, batch in enumerate(forget):
            optimizer.zero_grad()
            j = i * random.randint(1, 10000) % len(retain)
            loss = -base.get_loss(batch=batch, model=compare) + base.retain_coeff * base.get_loss(retain[j], compare)
            loss.backward()
            optimizer.step()
        swap(base.model, compare, names)
        if (epoch + 1) % base.eval_every == 0:
            base.eval_on_RTV(epoch + 1, "dynamic_GD_deep_unlearning")
