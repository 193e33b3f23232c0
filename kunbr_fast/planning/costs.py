"""What one forward and backward pass costs, from a model's config.json alone: parameters, FLOPs, bytes.

Index letters: T tokens, P places of the attention grid (B samples x the longest one), R rows with a label, D hidden
size, I width of the MLP, V vocabulary, b bytes of a weight.

Counts of parameters are exact. FLOPs are those of matrix products and attention, as torch's FlopCounterMode counts them
(attention without regard to causality). Bytes are what this package's own code keeps and makes: see `kept` and `Step`;
benchmarks/scripts/bench_plan.py holds them against measurements.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kunbr_fast.data.schedule import token_batches
from kunbr_fast.files.model_config import check_heads, check_names, check_plain, configured, read_model_config, text_of
from kunbr_fast.files.models import DTYPES, check_loadable, refusals
from kunbr_fast.files.shards import weights_in
from kunbr_fast.kernels.linear_loss.reference import HEAD_CHUNK

KERNEL_CHUNK = 256 << 20  # kernels.linear_loss.CHUNK_BYTES, which only a machine with triton can import

# ---------------------------------------------------------------- the model


@dataclasses.dataclass(frozen=True)
class Kind:
    """What tells one architecture of transformers from another. Biases: True, False, or the setting that says so.

    norms: of width D in a layer; inputs: different tensors that they normalise; layer_norm: with a mean and a bias;
    qk_norm: None, "head" or "all"; gated: an MLP of three matrices; activations: T x I tensors that its activation
    keeps; fused: whether `patch` serves MLP and attention; needs: what config.json must say.
    """

    norms: int = 2
    inputs: int = 2
    layer_norm: bool = False
    qk_norm: str | None = None
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    gated: bool = True
    activations: int = 2
    fused: bool = True
    needs: tuple[str, ...] = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
    )  # fmt: skip


_BIAS = dict(qkv_bias="attention_bias", out_bias="attention_bias")
_GPT = dict(layer_norm=True, mlp_bias=True, gated=False, fused=False)
KINDS = {
    "llama": Kind(**_BIAS, mlp_bias="mlp_bias"),
    "mistral": Kind(),
    "qwen2": Kind(qkv_bias=True),
    "qwen3": Kind(**_BIAS, qk_norm="head"),
    "smollm3": Kind(**_BIAS, mlp_bias="mlp_bias"),
    "phi3": Kind(),
    "olmo2": Kind(**_BIAS, qk_norm="all"),
    "gemma2": Kind(**_BIAS, norms=4, inputs=4),
    "gemma3_text": Kind(**_BIAS, norms=4, inputs=4, qk_norm="head"),
    "gpt2": Kind(
        **_GPT, qkv_bias=True, out_bias=True, activations=4,
        needs=("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"),
    ),
    "gpt_neox": Kind(**_GPT, **_BIAS, inputs=1, activations=1),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder. queries, keys: heads x width of a head; matrices: entries of a layer's weight matrices;
    layer, outside: parameters of a layer, and of all else (a tied embedding once); max_positions: most tokens of a
    sample."""

    name: str
    kind: Kind
    dtype: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    queries: int
    keys: int
    vocabulary: int
    tied: bool
    softcap: bool
    attention_softcap: bool
    layer: int
    matrices: int
    outside: int
    max_positions: int | None

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.outside

    @property
    def largest(self) -> int:
        """Entries of the largest parameter."""
        return max(self.hidden * self.vocabulary, self.largest_matrix)

    @property
    def rows(self) -> int:
        """Of all matrices of a layer together, as nn.Linear has them."""
        return self.queries + 2 * self.keys + 2 * self.hidden + (1 + self.kind.gated) * self.intermediate

    @property
    def columns(self) -> int:
        return 3 * self.hidden + self.queries + (1 + self.kind.gated) * self.hidden + self.intermediate

    @property
    def largest_matrix(self) -> int:
        """Entries of a layer's largest parameter."""
        return self.hidden * self.intermediate * (2 if self.name == "phi3" else 1)

    @classmethod
    def load(cls, path: str | Path, dtype: str | None = None) -> tuple[Architecture, list[str]]:
        """Reads a model directory or a config.json; also returns what had to be assumed. ValueError names the file,
        also one of weights in the directory that could not be loaded."""
        path = folder = Path(path)
        if folder.is_dir():
            path = folder / "config.json"
            if weights_in(folder, indexes=False):
                check_loadable(folder)
            else:
                check_plain(folder)
        values = read_model_config(path)
        name = values.get("model_type")
        if name not in KINDS:
            raise ValueError(f"{path}: model_type {name!r} is not one that can be planned: {', '.join(KINDS)}")
        lacking = [key for key in KINDS[name].needs if values.get(key) is None]
        if lacking:
            raise ValueError(f"{path}: has no {', '.join(lacking)}: copy the model's config.json again, or add it")
        check_names(values, path)
        with refusals(path):  # transformers knows each release's defaults
            config = configured(values)
            check_heads(text_of(config), path)
        saved = str(values.get("dtype") or values.get("torch_dtype") or "").removeprefix("torch.")
        if dtype or saved in DTYPES:
            return cls.of(config, name, dtype or saved), []
        dtype = "float32" if KINDS[name].layer_norm else "bfloat16"
        return cls.of(config, name, dtype), [f"dtype {dtype}: config.json names none"]

    @classmethod
    def of(cls, config: Any, name: str, dtype: str) -> Architecture:
        kind = KINDS[name]

        def has(bias: bool | str) -> bool:
            return bool(getattr(config, bias)) if isinstance(bias, str) else bias

        D, heads, V = config.hidden_size, config.num_attention_heads, config.vocab_size
        I = (getattr(config, "n_inner", None) or 4 * D) if name == "gpt2" else config.intermediate_size  # noqa: E741
        width = getattr(config, "head_dim", None) or D // heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        q, k = heads * width, key_heads * width
        matrices = D * (2 * q + 2 * k) + (3 if kind.gated else 2) * D * I
        norms = kind.norms * D * (1 + kind.layer_norm) + {None: 0, "head": 2 * width, "all": q + k}[kind.qk_norm]
        biases = has(kind.qkv_bias) * (q + 2 * k) + has(kind.out_bias) * D
        biases += has(kind.mlp_bias) * ((2 if kind.gated else 1) * I + D)
        positions = config.max_position_embeddings if name == "gpt2" else 0
        tied = bool(config.tie_word_embeddings)
        outside = V * D * (1 if tied else 2) + positions * D + D * (1 + kind.layer_norm)
        softcap, attention_softcap = (
            bool(getattr(config, name, None)) for name in ("final_logit_softcapping", "attn_logit_softcapping")
        )
        return cls(
            name, kind, dtype, D, I, config.num_hidden_layers, heads, q, k, V,
            tied, softcap, attention_softcap, matrices + norms + biases, matrices, outside,
            getattr(config, "max_position_embeddings", None),
        )  # fmt: skip


# ---------------------------------------------------------------- a batch


@dataclasses.dataclass(frozen=True)
class Batch:
    """Lengths of a packed batch's samples, and how many rows of each have a label."""

    lengths: Sequence[int]
    labels: Sequence[int]

    @classmethod
    def of(cls, sizes: Sequence[tuple[int, int]]) -> Batch:
        return cls(*zip(*sizes))

    @functools.cached_property
    def tokens(self) -> int:
        return sum(self.lengths)

    @functools.cached_property
    def rows(self) -> int:
        return sum(self.labels)

    @functools.cached_property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def places(self) -> int:
        return len(self.lengths) * self.longest

    @property
    def row_places(self) -> int:
        return len(self.labels) * max(self.labels)

    @property
    def short(self) -> bool:
        """Few labels: see Decoder.run."""
        return 2 * self.rows <= self.tokens


# ---------------------------------------------------------------- memory of a layer


def kept(a: Architecture, batch: Batch, *, active: bool, fused: bool, taps: bool = False, short: bool = False) -> int:
    """Bytes that a layer keeps for the backward pass, its input among them.

    active: its weights get gradients; taps: its MLP's inputs are kept for the density; short: queries and MLP are of
    the rows with a label alone.
    """
    k, b, T, D = a.kind, a.itemsize, batch.tokens, a.hidden
    fused = fused and k.fused
    U, Q = (batch.rows, batch.row_places) if short else (T, batch.places)  # rows of the MLP, places of queries
    ragged = min(batch.lengths) < batch.longest
    attention = (2 * Q * a.queries + 2 * batch.places * a.keys) * b + 4 * Q * a.heads
    if a.attention_softcap:  # scores after tanh, and after softmax in fp32; keys and values once for each query head
        scores = a.heads * Q * batch.longest
        attention = (3 * Q * a.queries + 2 * batch.places * a.keys) * b + scores * (b + 4 + (b if b < 4 else 0))
    norm = b
    if k.fused and not fused:  # the norms' own code is fp32 inside
        norm = max(4, b) + b * active
    out = norm * D * (T + (k.inputs - 1) * U) + norm * T * (a.queries + a.keys) * (k.qk_norm is not None)
    out += attention + (k.activations + (k.gated and not fused)) * U * a.intermediate * b
    if active:
        out += (T * D + U * a.queries * (ragged or short) + U * D + U * a.intermediate) * b
    elif taps:
        out += (T * D + T * a.intermediate) * b
    return out


def backward_extra(a: Architecture, batch: Batch, *, active: bool, fused: bool, torch: bool) -> int:
    """The most bytes that a layer's backward pass makes besides: in its MLP, with all that the layer keeps."""
    b, T, D, I = a.itemsize, batch.tokens, a.hidden, a.intermediate  # noqa: E741
    if not a.kind.gated:
        inside = max((3 if a.kind.activations == 4 else 2) * T * I, T * I + active * D * I)
    else:
        wide = (1 if fused and not torch else 2 if fused else 3) * T * I
        inside = max(wide, T * I + active * D * I, T * D + active * 2 * D * I)
    return (2 * T * D + inside) * b


def forward_extra(a: Architecture, batch: Batch) -> int:
    """The most bytes alive in a layer's forward pass without gradients: its input, and some tensors of its MLP."""
    b, T = a.itemsize, batch.tokens
    attention = 2 * T * a.hidden + (T + batch.places) * (2 * a.queries + 2 * a.keys)
    return max(attention, 2 * T * a.hidden + 4 * T * a.intermediate) * b


def head(a: Architecture, rows: int, *, torch: bool, train: bool) -> tuple[int, int]:
    """(bytes that head and loss keep, the most that they make besides); train: the head's weight gets a gradient."""
    b, V, D = a.itemsize, a.vocabulary, a.hidden
    keeps = (3 * rows * D + train * V * D) * b
    if torch:
        chunk = min(rows, max(1, HEAD_CHUNK // V)) * V
        extra = chunk * (4 + b * (b < 4) + 8 * bool(a.softcap))  # logits, their narrow copy, slope and what makes it
        if train:
            # logits, their gradient in the weight's dtype, and that in fp32
            narrow = (4 + b + 4 * (b < 4) + 4 * a.softcap) * chunk
            extra = max(max(extra, narrow) + (4 - b) * V * D, 4 * V * D * (b < 4))
    else:
        extra = min(rows * V * b, KERNEL_CHUNK)
        extra += train * (4 * V * D if rows * V * b > KERNEL_CHUNK and b < 4 else 0)
    return keeps, max(0, extra)


# ---------------------------------------------------------------- a training step


@dataclasses.dataclass(frozen=True)
class Step:
    """One forward and backward pass.

    block: the layers that are trained, None for every parameter of the model. start: the first layer that runs (its
    input is given, or it is 0). torch: plain torch computes, not the kernels. recompute: layers keep their input alone.
    taps: the density's pass, which trains nothing. rows_last: the last layer may leave out rows without a label.
    """

    a: Architecture
    batch: Batch
    block: range | None
    torch: bool
    start: int = 0
    fused: bool = True
    recompute: bool = False
    taps: bool = False
    rows_last: bool = True

    def _active(self, layer: int) -> bool:
        return not self.taps and (self.block is None or layer in self.block)

    def saved(self, layer: int) -> int:
        short = self._short and layer == self.a.layers - 1
        return kept(self.a, self.batch, active=self._active(layer), fused=self.fused, taps=self.taps, short=short)

    @property
    def _short(self) -> bool:
        """Whether the last layer leaves out rows without a label, as far as it can."""
        return self.rows_last and self.fused and self.a.kind.fused and self.a.name != "olmo2" and self.batch.short

    def memory(self) -> dict[str, int]:
        """{"activations", "head", "gradient", "workspace"} in bytes at the pass' peak. gradient: what the pass makes of
        those of the whole model (those of a block are there before)."""
        a, b = self.a, self.a.itemsize
        full = self.block is None and not self.taps
        layers = range(self.start, a.layers)
        sizes = [self.saved(i) for i in layers]
        shared = 2 * self.batch.tokens * (a.queries // a.heads) * b if a.name != "gpt2" else 0  # cos, sin
        inputs = self.batch.tokens * a.hidden * b
        stored = [inputs] * len(sizes) if self.recompute else sizes
        below = [shared, *itertools.accumulate(stored, initial=shared)][1:]
        keeps, extra = head(a, self.batch.rows, torch=self.torch, train=full)
        points = [dict(activations=below[-1], head=keeps + extra, gradient=0, workspace=0)]
        made = full * a.vocabulary * a.hidden * b
        if full:  # the head's gradient is scaled into a new tensor
            points.append(dict(activations=below[-1], head=keeps, gradient=made, workspace=0))
        top = self.batch.rows * a.hidden * b
        in_place = self.fused and a.kind.fused and not self.recompute  # see fused.activations
        for number in reversed(range(len(sizes))):
            active = self._active(layers[number])
            extra = backward_extra(a, self.batch, active=active, fused=in_place, torch=self.torch)
            again = sizes[number] if self.recompute else 0
            points.append(dict(activations=below[number + 1] + again, head=top, gradient=made, workspace=extra))
            made += full * a.layer * b
        if full:
            table = a.vocabulary * a.hidden
            made += (a.outside - (1 if a.tied else 2) * table) * b
            points.append(dict(activations=shared, head=0, gradient=made, workspace=table * b))
        return max(points, key=lambda point: sum(point.values()))

    # ------------------------------------------------ FLOPs

    def flops(self) -> int:
        a, batch = self.a, self.batch
        T, layers = batch.tokens, self.a.layers - self.start
        trained = layers if self.block is None else len(self.block)  # with taps, dW as well, a tile at a time
        attention = a.queries * batch.places * batch.longest
        total = (2 + 2 * self.recompute) * layers * a.matrices * T + 2 * (layers + trained) * a.matrices * T
        back = 8 if a.attention_softcap else 10  # the fused form computes the scores again
        total += (4 + back + 4 * self.recompute) * layers * attention
        if a.name == "olmo2" and self.block is not None and self.start == self.block.start:
            # its first projections read the block's input itself, which needs no gradient; others' read a trained
            # norm's output
            total -= 2 * a.hidden * (a.queries + 2 * a.keys) * T
        if self._short:
            mlp = 3 * a.hidden * a.intermediate + (1 if a.name == "phi3" else 2) * a.hidden * a.queries
            total -= (4 + 2 * self._active(a.layers - 1)) * mlp * (T - batch.rows)
            total -= (4 + back) * a.queries * batch.longest * (batch.places - batch.row_places)
        return total + 2 * batch.rows * a.vocabulary * a.hidden * (3 if self.block is None and not self.taps else 2)


def forward_flops(a: Architecture, batch: Batch, layers: int, rows: int = 0) -> int:
    once = 2 * a.matrices * batch.tokens + 4 * a.queries * batch.places * batch.longest
    return layers * once + 2 * rows * a.vocabulary * a.hidden


def batches(sizes: Sequence[tuple[int, int]], most: int) -> Iterator[Batch]:
    """Consecutive samples, at most `most` tokens together, as `schedule.token_batches` puts them."""
    for indices in token_batches([tokens for tokens, _ in sizes], most):
        yield Batch.of([sizes[i] for i in indices])
