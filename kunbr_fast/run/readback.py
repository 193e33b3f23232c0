"""The result of a run, read from its folder by file, is the model in memory: the last look before checkpoints go."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kunbr_fast.files.digests import tokenizer_fingerprint
from kunbr_fast.files.headers import FLOATS
from kunbr_fast.files.model_folder import is_weights, model_files
from kunbr_fast.files.models import load_model, load_tokenizer
from kunbr_fast.files.readback import NotWritten, is_known
from kunbr_fast.files.shards import Shards, instead_of_weights
from kunbr_fast.files.shown import plain
from kunbr_fast.files.weight_files import DTYPES
from kunbr_fast.memory import free_host_bytes, is_out_of_memory, release
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.frozen import evaluating
from kunbr_fast.model.streaming import open_streamed
from kunbr_fast.model.weights import weights_of
from kunbr_fast.run.samples import Samples

SAMPLES, TOKENS = 2, 32  # of each kind, and of each
logger = logging.getLogger(__name__)
CONFIG = "config.json"
COARSE = 0.1  # relative: what half precision rounds logits by, as of `Decoder.rounding`


class ReadBack:
    """Made before the model is saved, for `check` afterwards.

    Every tensor and setting in the folder is compared with memory, whoever has written them; then logits, of samples of
    the run, of the model that a fresh reader makes of the folder. It has one layer in memory at a time
    (`open_streamed`).

    written: the run itself writes the model there, in the form of its source. Else the user may, in another dtype too.
    tokenizer: what must be there besides.
    """

    def __init__(self, out: str | Path, decoder: Decoder, samples: Samples, written: bool, tokenizer: Any = None):
        self.out, self.decoder, self.written, self.tokenizer = Path(out), decoder, written, tokenizer
        chosen = [sample["input_ids"][:TOKENS] for part in samples.parts.values() for sample in part[:SAMPLES]]
        length = min(map(len, chosen))
        self.ids = torch.stack([ids[:length].cpu() for ids in chosen])
        with decoder.rotary.alone():
            self.truth = _logits(decoder.model, self.ids.to(decoder.device))
        self._before = self._mark()

    def _mark(self) -> dict[str, tuple[int, int, int]]:
        """Changes when a model, or a part of one, is written to the folder."""
        parts = {name: path for name, path in model_files(self.out).items() if is_weights(name) or name == CONFIG}
        found = {name: os.stat(path) for name, path in parts.items()}
        return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}

    def check(self) -> str | None:
        """What to say of it; a log line says where a user's own model is in another dtype, or not there. `NotWritten`
        where the folder holds another model than the one in memory; of a user's own, where a part of one was written
        since."""
        if not self.written:
            now, others = self._mark(), instead_of_weights(self.out) if self.out.is_dir() else None
            if all(self._before.get(name) == mark for name, mark in now.items()):
                logger.warning("not read back: no model was written to %s", plain(self.out))
                return None
            if now.keys() == {CONFIG} and others is not None:
                logger.warning("not read back: no model was written to %s (%s)", plain(self.out), others)
                return None
        try:
            weights_of(self.decoder.model).check_saved(self.out, cast=not self.written or self.decoder.streamed)
            self._check_tokenizer()
            self._name_dtypes()
            return self._compare()
        except ValueError as error:
            raise NotWritten(f"{error} [read back after writing]") from error

    def _check_tokenizer(self) -> None:
        if self.tokenizer is None:
            return
        if tokenizer_fingerprint(load_tokenizer(self.out)) != tokenizer_fingerprint(self.tokenizer):
            raise ValueError(f"{plain(self.out)}: its tokenizer is another than the one in memory")

    def _name_dtypes(self) -> None:
        """A line where they are others than in memory."""
        if self.written:
            return
        tensors = self.decoder.model.state_dict().values()
        here = {DTYPES.get(tensor.dtype) for tensor in tensors if tensor.is_floating_point()}
        there = {tensor.dtype for tensor in Shards(self.out).tensors.values()} & set(FLOATS)
        if there != here:
            names = [" and ".join(sorted(map(str, dtypes))) for dtypes in (there, here)]
            logger.warning("%s is in %s, the model in memory in %s: the same else", plain(self.out), *names)

    def _compare(self) -> str:
        """Logits."""
        if not is_known(self.decoder.model.config):
            return "logits are not read back: transformers does not know this architecture by its config.json"
        found = self._read(self.decoder.device)
        if found is None:
            return "logits are not read back: this architecture is loaded whole, for which memory is not enough"
        error = float((found - self.truth).norm() / self.truth.norm())
        coarse = {tensor.dtype for tensor in Shards(self.out).tensors.values()} & {"BF16", "F16"}
        limit = COARSE if coarse else self.decoder.rounding
        if not error <= limit:
            raise ValueError(
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
