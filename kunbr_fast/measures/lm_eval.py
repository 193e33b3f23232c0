"""Tasks of lm-evaluation-harness (EleutherAI) on a model in memory, with data that is on this machine.

A task is one of the harness's own whose data `datasets` has in its cache, or one of a folder of the user's: YAML files
with `dataset_path: json` and `dataset_kwargs: {data_files: {test: /absolute/path.jsonl}}`, as the harness documents it.
Nothing is asked of a network.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kunbr_fast.model.frozen import evaluating
from kunbr_fast.model.ownership import uncompiled
from kunbr_fast.model.weights import weights_of
from kunbr_fast.values import BATCH, COUNT, check

HEADLINES = ("acc_norm", "acc")  # the first that a task has speaks for it
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def run_lm_eval(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    include: str | Path | None = None,
    batch_size: int = 8,
    progress: str | None = None,
) -> dict[str, dict[str, Any]]:
    """{task: {"metric": "acc", "value": 0..1, "standard_error": float or None, "number": samples}} of each task.

    The metric is acc_norm (of answers, by log-likelihood over characters) if the task has it, else acc, else its first.
    A group of tasks that the harness aggregates (mmlu) is one entry, a tag one for each of its tasks.

    model: a Hugging Face causal language model in memory; it stays as it was. limit: samples of a task, its first ones.
    include: a folder of task definitions beside the harness's own, which it overrides. batch_size: texts at once.
    progress: a line above the harness's own progress bars, None for no bars.

    Errors: ValueError where the package is missing, for a task that is unknown or defined wrongly, or whose data is not
    on this machine, and for a streamed model.
    """
    model = uncompiled(model)
    check("batch_size", batch_size, BATCH)
    check("limit", limit, COUNT, null=True)
    if not tasks:
        raise ValueError("no task to run: name one, such as hellaswag")
    if weights_of(model).streamed:
        raise ValueError(f"{type(model).__name__} is streamed, which lm-evaluation-harness cannot run: load it whole")
    if include is not None and not Path(include).is_dir():
        raise ValueError(f"include={str(include)!r}: expected a folder with task definitions (YAML)")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"tasks need lm-evaluation-harness ({error}): pip install 'kunbr-fast[lm-eval]'") from error
    with _offline(), _quiet(progress), _same_random_numbers(), evaluating(model):
        folder = None if include is None else str(include)
        manager = TaskManager(include_path=folder, include_defaults=False)
        if any(name not in manager.all_tasks for name in tasks):  # reading the harness's own, thousands, takes seconds
            manager = TaskManager(include_path=folder)
        loaded = {name: _load(manager, name) for name in dict.fromkeys(tasks)}
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = {}
        for name, parts in loaded.items():  # each by itself: the harness takes no task twice, in a group and alone
            how = dict(task_manager=manager, limit=limit, log_samples=False)
            own = lm_eval.simple_evaluate(harness, tasks=parts, **how)["results"]
            chosen = {name: own[name]} if name in own and _metrics(own[name]) else own
            found.update({task: _headline(task, row) for task, row in chosen.items() if _metrics(row)})
    return found


def _load(manager: Any, name: str) -> list[Any]:
    """The tasks, or the group, that a name stands for."""
    if name not in manager.all_tasks and not Path(name).is_file():
        raise ValueError(
            f"lm-evaluation-harness has no task {name!r}: `lm-eval ls tasks` lists its own; name the folder of yours "
            "(include, --lm-eval-include)"
        )
    try:
        loaded = manager.load([name])
    except OSError as error:  # datasets raises ConnectionError offline, FileNotFoundError for files
        raise ValueError(
            f"task {name}: its data is not on this machine ({_said(error)}). Nothing is downloaded: load it once with "
            "`datasets.load_dataset` where there is a network and bring the cache (HF_HOME), or define the task with "
            "files of yours in a folder (include, --lm-eval-include)"
        ) from error
    except Exception as error:  # of any kind: definitions hold code
        raise ValueError(f"task {name}: its definition does not load ({_said(error)})") from error
    inside = {child for children in loaded["group_map"].values() for child in children}
    groups = [group for key, group in loaded["groups"].items() if key not in inside]
    return groups or list(loaded["tasks"].values())


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _metrics(row: Mapping[str, Any]) -> dict[str, str]:
    """{"acc": "acc,none"} of a result's row, whose keys are a metric and the filter of answers behind it: the first
    filter of each metric."""
    found: dict[str, str] = {}
    for key in row:
        metric, comma, _ = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            found.setdefault(metric, key)
    return found


def _headline(task: str, row: Mapping[str, Any]) -> dict[str, Any]:
    metrics = _metrics(row)
    metric = next((name for name in HEADLINES if name in metrics), next(iter(metrics)))
    value, error = row[metrics[metric]], row.get(metrics[metric].replace(",", "_stderr,", 1))
    if not isinstance(value, (int, float)):
        raise ValueError(f"task {task}: {metric} is {value!r}, expected a number")
    known = isinstance(error, (int, float)) and np.isfinite(error)  # "N/A" of a metric without one
    return {
        "metric": metric,
        "value": float(value),
        "standard_error": float(error) if known else None,
        "number": int(row["sample_len"]),
    }


# ------------------------------------------------------------------------------------------------ what stays as it was


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Inside, neither huggingface_hub nor datasets asks a network. They read the environment when they are imported."""
    import datasets
    import huggingface_hub

    owners = [(module, name) for module in (huggingface_hub.constants, datasets.config) for name in OFFLINE]
    owners = [(module, name, getattr(module, name)) for module, name in owners if hasattr(module, name)]
    before = {name: os.environ.get(name) for name in OFFLINE}
    try:
        os.environ.update(dict.fromkeys(OFFLINE, "1"))
        for module, name, _ in owners:
            setattr(module, name, True)
        yield
    finally:
        for module, name, value in owners:
            setattr(module, name, value)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _quiet(progress: str | None) -> Iterator[None]:
    """Inside, the harness's bars are shown, under a line that says what they are of, or nothing is."""
    if progress is not None:
        print(progress, file=sys.stderr, flush=True)
        yield
        return
    with contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    """The harness seeds all generators of the process; afterwards they go on as if it had not."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
