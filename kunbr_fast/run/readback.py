"""The result of a run, read from its folder by file, is the model in memory: the last look before checkpoints go."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from kunbr_fast.files.model_folder import is_model
from kunbr_fast.files.models import load_model
from kunbr_fast.files.readback import NotWritten, is_known
from kunbr_fast.files.shards import Shards
from kunbr_fast.files.shown import plain
from kunbr_fast.memory import free_host_bytes, is_out_of_memory, release
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.frozen import evaluating
from kunbr_fast.model.streaming import open_streamed
from kunbr_fast.run.samples import Samples

SAMPLES, TOKENS = 2, 32  # of each kind, and of each
COARSE = 0.1  # relative: what half precision rounds logits by, as of `Decoder.rounding`


class ReadBack:
    """Made before the model is saved, for `check` afterwards.

    `save_model` has compared every tensor and setting. This compares logits, of samples of the run, of the model that
    a fresh reader makes of the folder. It has one layer in memory at a time (`open_streamed`).
    """

    def __init__(self, out: str | Path, decoder: Decoder, samples: Samples):
        self.out, self.decoder = Path(out), decoder
        chosen = [sample["input_ids"][:TOKENS] for part in samples.parts.values() for sample in part[:SAMPLES]]
        length = min(map(len, chosen))
        self.ids = torch.stack([ids[:length].cpu() for ids in chosen])
        with decoder.rotary.alone():
            self.truth = _logits(decoder.model, self.ids.to(decoder.device))
        self._before = self._mark()

    def _mark(self) -> tuple[int, int] | None:
        """Changes when a model is written to the folder."""
        try:
            found = os.stat(self.out / "config.json")
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def check(self) -> str | None:
        """What to say of it; None where the folder holds no model that was written since. `NotWritten` where its logits
        are others."""
        if self._mark() == self._before or not is_model(self.out):
            return None
        if not is_known(self.decoder.model.config):
            return "logits are not read back: transformers does not know this architecture by its config.json"
        try:
            found = self._read(self.decoder.device)
        except ValueError as error:
            raise NotWritten(f"{error} [read back after writing]") from error
        if found is None:
            return "logits are not read back: this architecture is loaded whole, for which memory is not enough"
        error = float((found - self.truth).norm() / self.truth.norm())
        coarse = {tensor.dtype for tensor in Shards(self.out).tensors.values()} & {"BF16", "F16"}
        limit = COARSE if coarse else self.decoder.rounding
        if not error <= limit:
            raise NotWritten(
                f"{plain(self.out)}: read by file, its logits differ from those of the model in memory by {error:.1e} "
                f"relative (limit {limit:.1e})"
            )
        return f"read back: {found.shape[0] * found.shape[1]} logits of {found.shape[2]} differ by {error:.1e} relative"

    def _read(self, device: torch.device) -> torch.Tensor | None:
        dtype = str(self.decoder.dtype).removeprefix("torch.")
        try:
            try:
                model = open_streamed(self.out, device, dtype)
            except ValueError:  # it can only be loaded whole, or not at all
                if Shards(self.out).nbytes > free_host_bytes():
                    return None
                model = load_model(self.out, dtype, "cpu")
                device = torch.device("cpu")
            return _logits(model, self.ids.to(device))
        except Exception as error:
            if not is_out_of_memory(error) or device.type == "cpu":
                raise
        release()
        return self._read(torch.device("cpu"))


@torch.no_grad()
def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with evaluating(model):
        return model(input_ids=ids, use_cache=False).logits.double().cpu()
