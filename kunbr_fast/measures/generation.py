"""Continuations of many prompts at once, greedy or sampled: the tokens that each prompt alone would get.

Prompts of similar length go through the model together, left-padded, a few thousand tokens at a time, and leave their
keys and values in reserved memory (`key_values`). A step then makes one token of every sequence. Sequences that have
ended are dropped once they are a quarter of the batch; equal prompts are read once.

Sampling draws one number for each prompt and token, before anything runs, so what is sampled does not depend on which
prompts run together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from kunbr_fast.measures.sequence_batch import Batch, Way, find_way
from kunbr_fast.memory import OutOfMemory, is_out_of_memory, release
from kunbr_fast.model.frozen import evaluating
from kunbr_fast.model.ownership import uncompiled
from kunbr_fast.model.rotary import RotaryByLength
from kunbr_fast.model.vocabulary import check_vocabulary
from kunbr_fast.model.weights import weights_of
from kunbr_fast.values import ABOVE_ZERO, COUNT, SEED, SHARE, check, least

logger = logging.getLogger(__name__)

TOKENS_AT_ONCE = 1 << 15  # in a batch's cache: 1.4 GiB of SmolLM2-135M in fp32, 4 GiB of Llama-3-8B in bf16
FEW = 256  # tokens that are likely to reach top_p
DROPPED = 0.25  # the share of ended sequences from which on the cache is copied without them


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Tokens are drawn from softmax(logits / temperature), of which the most probable tokens are kept that together
    reach top_p (Holtzman et al., arXiv 1904.09751). The same seed draws the same.

    ValueError for a temperature or a top_p that is not above 0, or a top_p above 1.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in (("temperature", ABOVE_ZERO), ("top_p", SHARE), ("seed", SEED)):
            check(name, getattr(self, name), kind)

    def draw(self, logits: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """(B,) token ids: of logits (B, V) the token in which the distribution's sum passes drawn (B,), in 0..1."""
        shares = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature).softmax(-1)
        order = None
        if self.top_p < 1:
            shares, order = self._most_probable(shares)
            shares = shares.where(shares.cumsum(-1, dtype=torch.float64) - shares < self.top_p, 0.0)
        sums = shares.cumsum(-1, dtype=torch.float64)
        found = torch.searchsorted(sums, (drawn.to(sums.device) * sums[:, -1])[:, None], right=True)
        found = found.clamp(max=shares.shape[-1] - 1)
        return (found if order is None else order.gather(1, found))[:, 0]

    def _most_probable(self, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The largest of (B, V) shares, in order, and their tokens: at least those that together reach top_p. Sorting
        64 vocabularies of 49152 takes a core 0.2 s, finding the first 2048 of each 0.03 s."""
        number = FEW if shares.device.type == "cpu" else shares.shape[-1]  # a GPU's answer would be waited for
        while number < shares.shape[-1]:
            found, tokens = shares.topk(number)
            if bool((found.sum(-1, dtype=torch.float64) >= self.top_p).all()):
                return found, tokens
            number *= 8
        found, tokens = shares.sort(dim=-1, descending=True, stable=True)
        return found, tokens


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: frozenset[int],
    tokens_at_once: int = TOKENS_AT_ONCE,
    sample: Sampling | None = None,
    progress: str | None = None,
    limit: int | None = None,
) -> list[list[int]]:
    """The token ids that continue each prompt, in the prompts' order, without the stop token.

    Equals `model.generate(prompt[None], do_sample=False, max_new_tokens=...)[0, len(prompt):]` of each prompt, up to
    the first token of `stop`. Batches round in another way: of two tokens that are equally probable up to rounding,
    either may be taken.

    model: a Hugging Face causal language model in memory. It is in eval mode meanwhile, and stays as it was.
    max_new_tokens: tokens after which a continuation ends anyway. tokens_at_once: the most in a batch's cache, prompts
    and continuations together; halved where memory runs out. sample: None for the most probable token.
    progress: label of a progress bar, None for no bar. limit: the model's positions (`Decoder.max_positions`), where
    they are less than its configuration says.

    Errors: ValueError for a streamed model, an empty prompt, a token that the model does not have, a prompt that leaves
    no room for max_new_tokens; FloatingPointError for logits that are not finite; OutOfMemory where one prompt is too
    much.
    """
    model = uncompiled(model)
    check("max_new_tokens", max_new_tokens, COUNT)
    check("tokens_at_once", tokens_at_once, COUNT)
    _check_prompts(model, prompts, max_new_tokens, least(limit, _positions(model)))
    if not prompts:
        return []
    drawn = None
    if sample is not None:
        generator = torch.Generator().manual_seed(sample.seed)
        drawn = torch.rand(len(prompts), max_new_tokens, dtype=torch.float64, generator=generator)
    total = len(prompts) * max_new_tokens
    bar = tqdm(total=total, desc=progress, unit="token", unit_scale=True, leave=False, disable=progress is None)
    # not inference_mode: tensors that a model keeps from here (rotary tables) serve training too
    with evaluating(model), torch.no_grad(), bar:
        longest = max(map(len, prompts)) + max_new_tokens
        way = find_way(model, prompts, longest)
        run = _Run(model, way, prompts, max_new_tokens, stop, sample, drawn, bar)
        return _all(run, tokens_at_once)


def _positions(model: nn.Module) -> int | None:
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if RotaryByLength(model).unlimited:
        return None
    return limit if limit is not None and limit > 0 else None  # XLNet says -1


def _check_prompts(model: nn.Module, prompts: Sequence[Sequence[int]], new: int, limit: int | None) -> None:
    name = type(model).__name__
    if weights_of(model).streamed:
        raise ValueError(f"{name} is streamed, and a step would read all its files: load it whole to generate")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty: give it at least one token, such as the tokenizer's BOS")
        if limit is not None and len(prompt) + new > limit:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens, and {new} are to follow (max_new_tokens), but {name} has "
                f"{limit} positions: shorten it, leave it out or ask for fewer"
            )
    check_vocabulary(model, map(torch.tensor, prompts), (f"prompt {i}" for i in range(len(prompts))))


# ------------------------------------------------------------------------------------------------ batches


@dataclasses.dataclass(frozen=True)
class _Run:
    """What is to be continued, and how. way: None for one prompt at a time. drawn: (prompts, max_new_tokens) numbers in
    0..1 to sample by."""

    model: nn.Module
    way: Way | None
    prompts: Sequence[Sequence[int]]
    new: int
    stop: frozenset[int]
    sample: Sampling | None
    drawn: torch.Tensor | None
    bar: tqdm

    def choose(self, logits: torch.Tensor, drawn: torch.Tensor | None) -> torch.Tensor:
        """(B,) tokens of logits (B, V)."""
        return logits.argmax(-1) if self.sample is None else self.sample.draw(logits, drawn)

    def cut(self, tokens: list[int]) -> list[int]:
        """Up to the first stop token."""
        return tokens[: next((i for i, token in enumerate(tokens) if token in self.stop), len(tokens))]


def _all(run: _Run, at_once: int) -> list[list[int]]:
    """Batch by batch, the longest prompts first: if memory runs out, it does so soon."""
    waiting = sorted(range(len(run.prompts)), key=lambda i: -len(run.prompts[i]))
    found: dict[int, list[int]] = {}
    while waiting:
        columns = len(run.prompts[waiting[0]]) + run.new
        number = 1 if run.way is None else run.way.batch([run.prompts[i] for i in waiting], run.new, at_once)
        group, at, short = waiting[:number], run.bar.n, None
        try:
            if run.way is None:
                found[group[0]] = _alone(run, group[0])
            else:
                found.update(_together(run, group))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            short = str(error)
        if short is None:
            run.bar.update(at + len(group) * run.new - run.bar.n)
            del waiting[: len(group)]
            continue
        release()  # outside the except, whose error keeps the tensors of its frames
        run.bar.update(at - run.bar.n)
        if len(group) == 1:
            raise OutOfMemory(
                f"out of memory with prompt {group[0]} of {columns - run.new} tokens and {run.new} to follow alone: "
                f"lower max_new_tokens or shorten it. What was said: {short[:300]}"
            )
        at_once = len(group) // 2 * columns
        logger.warning("out of memory with %d sequences together, going on with %d", len(group), len(group) // 2)
    return [found[i] for i in range(len(run.prompts))]


def looks(device: torch.device) -> int:
    """Steps from one look whether sequences have ended to the next: the host waits for a GPU meanwhile."""
    return 1 if device.type == "cpu" else 8


@dataclasses.dataclass
class _Rows:
    """The sequences of a batch that have not ended: their prompts' numbers, tokens made (B, new), numbers to sample by
    (B, new) or None, and whether they have ended (B,)."""

    numbers: list[int]
    made: torch.Tensor
    drawn: torch.Tensor | None
    ended: torch.Tensor

    def take(self, rows: torch.Tensor) -> None:
        self.numbers = [self.numbers[i] for i in rows.tolist()]
        self.made, self.ended = self.made[rows], self.ended[rows]
        self.drawn = None if self.drawn is None else self.drawn[rows]


def _together(run: _Run, group: Sequence[int]) -> dict[int, list[int]]:
    """The continuations of these prompts, as one batch."""
    batch = Batch(run.model, run.way, [run.prompts[i] for i in group], run.new)
    logits, device = batch.read(), batch.device
    rows = _Rows(
        list(group),
        torch.zeros(len(group), run.new, dtype=torch.int64, device=device),
        None if run.drawn is None else run.drawn[list(group)].to(device),
        torch.zeros(len(group), dtype=torch.bool, device=device),
    )
    stop = torch.tensor(sorted(run.stop), dtype=torch.int64, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    found, looked = {}, 0
    for step in range(run.new):
        tokens = run.choose(logits, None if rows.drawn is None else rows.drawn[:, step]).to(device)
        finite &= logits.gather(1, tokens.to(logits.device)[:, None]).isfinite().all().to(device)
        rows.made[:, step] = tokens
        rows.ended |= torch.isin(tokens, stop)
        if step + 1 == run.new:
            break
        if (step + 1) % looks(device) == 0:
            here = (~rows.ended).nonzero()[:, 0]  # the host waits
            run.bar.update(len(rows.numbers) * (step + 1 - looked))
            looked = step + 1
            if not len(here):
                break
            if len(here) <= (1 - DROPPED) * len(rows.numbers):
                found.update(_continuations(run, rows))  # of those that go on too: they are overwritten
                run.bar.update((len(rows.numbers) - len(here)) * (run.new - looked))
                batch.take(here)
                rows.take(here)
                tokens = tokens[here]
        logits = batch.step(tokens)
    _check_finite(finite, group)
    return found | _continuations(run, rows)


def _continuations(run: _Run, rows: _Rows) -> dict[int, list[int]]:
    return {number: run.cut(tokens) for number, tokens in zip(rows.numbers, rows.made.tolist())}


def _check_finite(finite: torch.Tensor, group: Sequence[int]) -> None:
    if not bool(finite):
        numbers = f"{min(group)}" if len(group) == 1 else f"{min(group)} to {max(group)}"
        raise FloatingPointError(
            f"the model's logits for prompts {numbers} are not finite: its weights have diverged; use a lower learning "
            "rate or an earlier checkpoint"
        )


# ------------------------------------------------------------------------------------------------ one at a time


class _Chosen:
    """Leaves the token that was sampled, for `generate` to take."""

    def __init__(self, run: _Run, number: int):
        self.run, self.number, self.step = run, number, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        drawn = None if self.run.drawn is None else self.run.drawn[self.number : self.number + 1, self.step]
        token = self.run.choose(scores, drawn)[:, None]
        _check_finite(scores.gather(1, token).isfinite().all(), [self.number])
        self.step += 1
        return torch.full_like(scores, float("-inf")).scatter(1, token, 0.0)


def _alone(run: _Run, number: int) -> list[int]:
    """The continuation of a prompt by the model's own `generate`, without what its generation_config adds."""
    from transformers import LogitsProcessorList

    model, prompt = run.model, run.prompts[number]
    ids = torch.tensor([list(prompt)], device=model.get_input_embeddings().weight.device)
    how: dict[str, Any] = dict(do_sample=False, max_new_tokens=run.new, pad_token_id=0)
    if run.stop:
        how["eos_token_id"] = sorted(run.stop)
    with _plainly(model), RotaryByLength(model).alone():
        chosen = LogitsProcessorList([_Chosen(run, number)])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), logits_processor=chosen, **how)
    return run.cut(made[0, len(prompt) :].tolist())


@contextlib.contextmanager
def _plainly(model: nn.Module) -> Iterator[None]:
    """Inside, no model in this one has defaults of its own for `generate`: a penalty, a temperature, an end token."""
    from transformers import GenerationConfig

    owners = [module for module in model.modules() if "generation_config" in vars(module)]
    before = [module.generation_config for module in owners]
    try:
        for module in owners:
            module.generation_config = GenerationConfig()
        yield
    finally:
        for module, own in zip(owners, before):
            module.generation_config = own
