"""Full-parameter training on packed batches: the warm-up, the RTT attack, teaching; and what all training shares."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from kunbr_fast import losses
from kunbr_fast.atomic import write_with
from kunbr_fast.data import PackedBatch, Sample, Schedule, pack
from kunbr_fast.decoder import Decoder
from kunbr_fast.optim import make_optimizer


class Diverged(RuntimeError):
    """Training went to NaN, infinity, or a retain loss beyond its limit; the weights are those before the bad step."""

    def __init__(self, where: str, metrics: Mapping[str, float | None]):
        self.where, self.metrics = where, dict(metrics)
        shown = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items() if isinstance(v, float))
        super().__init__(
            f"diverged at {where} ({shown}). Gradient difference has no lower bound: lower the learning rate, raise "
            "retain_coeff, set forget_loss_cap (for example 10), or train fewer epochs"
        )


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter requires grad (unless set there) and dropout is off; afterwards requires_grad flags,
    gradients and train/eval modes are as before."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for parameter, _, _ in before:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, flag, grad in before:
            parameter.requires_grad_(flag)
            parameter.grad = grad
        for module, mode in modes:
            module.training = mode


class FullTraining:
    """Every parameter of the model, trained in place. `step` takes packed batches; `state` is what a resume needs."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        lr: float,
        optimizer: str = "adamw",
        betas: tuple[float, float] | None = None,
        weight_decay: float = 0.0,
    ):
        self.decoder = decoder
        self.parameters = dict(decoder.model.named_parameters())  # a tied weight appears once
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.optimizer = make_optimizer(optimizer, self.parameters.values(), lr, betas, weight_decay)
        self.steps = 0

    def step(self, batch: PackedBatch, rows: losses.RowWeights, num_forget: int = 0) -> dict[str, float | None]:
        """One update; the batch's first `num_forget` samples are reported as forget, the others as retain."""
        decoder = self.decoder
        out = decoder.run(batch)
        loss, nll = losses.linear_loss(
            decoder.final(out[batch.rows]), decoder.head, batch.targets, rows.weight, rows.cap
        )
        loss.backward()
        per_sample = losses.mean_nll(batch, nll)
        metrics = {
            "loss": float(loss.detach()),
            "forget_loss": float(per_sample[:num_forget].mean()) if num_forget else None,
            "retain_loss": float(per_sample[num_forget:].mean()) if num_forget < batch.num_samples else None,
        }
        norms = [torch.linalg.vector_norm(p.grad) for p in self.parameters.values() if p.grad is not None]
        finite = bool(torch.stack(norms).isfinite().all()) and bool(loss.isfinite())
        if finite:
            self.optimizer.step()
            self.steps += 1
        self.optimizer.zero_grad()
        if not finite:
            raise Diverged(f"step {self.steps}", metrics)
        return metrics

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and optimiser state by name. The tensors themselves: later steps change them."""
        tensors = {name: parameter.data for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
        return tensors

    @torch.no_grad()
    def load_state(self, state: Mapping[str, torch.Tensor], steps: int) -> None:
        """Takes up a `state()` after `steps` steps; the next steps give the same bits as uninterrupted ones."""
        for name, parameter in self.parameters.items():
            parameter.copy_(state[name])
        self.optimizer.state.clear()
        for key, value in state.items():
            if key.startswith("optimizer."):
                _, slot, name = key.split(".", 2)
                parameter = self.parameters[name]
                self.optimizer.state[parameter][slot] = value.to(parameter.device, copy=True)  # updated in place
        self.steps = steps


def train_all(
    decoder: Decoder,
    samples: Sequence[Sample],
    *,
    lr: float,
    epochs: int,
    batch_size: int,
    optimizer: str = "adamw",
    betas: tuple[float, float] | None = None,
    weight_decay: float = 0.0,
    seed: int = 0,
    on_epoch: Callable[[int], None] | None = None,
    on_step: Callable[[dict], None] | None = None,
    progress: str | None = None,
) -> None:
    """Plain fine-tuning of all parameters in place: minimises the mean over samples of each one's mean NLL.

    on_epoch(n) is called after epoch n = 1, 2, ... and may evaluate the model. Raises `Diverged`.
    """
    schedule = Schedule(len(samples), 0, batch_size, 1, epochs, seed)
    with frozen(decoder.model):
        training = FullTraining(decoder, lr=lr, optimizer=optimizer, betas=betas, weight_decay=weight_decay)
        for step in tqdm(range(len(schedule)), desc=progress, unit="step", leave=False, disable=progress is None):
            indices, _ = schedule[step]
            batch = pack([samples[i] for i in indices]).to(decoder.device)
            metrics = training.step(batch, losses.likelihood(batch))
            if on_step is not None:
                on_step(metrics)
            if on_epoch is not None and (step + 1) % schedule.steps_per_epoch == 0:
                with torch.no_grad():
                    on_epoch((step + 1) // schedule.steps_per_epoch)


class WeightSnapshot:
    """A model's weights in one safetensors file, read and written tensor by tensor, bit for bit.

    Behaves as a read-only mapping from parameter names to tensors, each read from the file when it is asked for.
    A tied weight is kept once.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such weights file")

    @classmethod
    def save(cls, model: nn.Module, path: str | Path) -> WeightSnapshot:
        """Writes the model's parameters to `path`, atomically."""
        tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
        write_with(path, lambda temporary: save_file(tensors, temporary))
        return cls(path)

    def names(self) -> list[str]:
        with safe_open(self.path, "pt") as file:
            return list(file.keys())

    def __contains__(self, name: object) -> bool:
        with safe_open(self.path, "pt") as file:
            return name in file.keys()

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(name)

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Copies the weights into the model, or raises ValueError, with the model as it was, unless it has the same
        parameters, shapes and dtypes."""
        parameters = dict(model.named_parameters())
        with safe_open(self.path, "pt") as file:
            names = set(file.keys())
            if names != set(parameters):
                odd = sorted(names ^ set(parameters))[0]
                raise ValueError(f"{self.path}: {odd} is in only one of the file and {type(model).__name__}")
            values = {name: file.get_tensor(name) for name in parameters}  # mapped, not read, until they are copied
            for name, parameter in parameters.items():
                value = values[name]
                if value.shape != parameter.shape or value.dtype != parameter.dtype:
                    raise ValueError(
                        f"{self.path}: {name} is {value.dtype} {tuple(value.shape)}, the model's is "
                        f"{parameter.dtype} {tuple(parameter.shape)}"
                    )
            for name, parameter in parameters.items():
                parameter.copy_(values[name])
