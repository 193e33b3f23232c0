"""`unlearn`: the whole of KUnBR in one call."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from kunbr_fast.data import is_question
from kunbr_fast.evaluation.folds import Fold
from kunbr_fast.evaluation.report import Report
from kunbr_fast.files.lock import hold
from kunbr_fast.files.readback import NotWritten
from kunbr_fast.files.scratch import scratch
from kunbr_fast.files.shown import plain
from kunbr_fast.keywords import named_by, taken
from kunbr_fast.model.frozen import frozen
from kunbr_fast.model.ownership import no_adapter, trainable, uncompiled, whole
from kunbr_fast.model.weights import weights_of
from kunbr_fast.parallel.group import ALONE, Group
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.context import RunContext, RunInputs
from kunbr_fast.run.folder import NAME, SAVING, CheckpointFolder, former_folder
from kunbr_fast.run.log import RunLog, opened
from kunbr_fast.run.output import check_not_read, check_output, check_place
from kunbr_fast.run.readback import ReadBack
from kunbr_fast.run.reporter import Reporter
from kunbr_fast.run.samples import entries
from kunbr_fast.run.stages import Stages
from kunbr_fast.stopping import Stop


@dataclasses.dataclass(frozen=True)
class Options:
    """The keywords of `unlearn`."""

    tokenizer: Any = None
    unlearned: nn.Module | None = None
    forget_questions: Sequence[Mapping] | None = None
    retain_questions: Sequence[Mapping] | None = None
    folds: Sequence[Fold] | None = None
    output_dir: str | Path | None = None
    resume: bool = False
    overwrite: bool = False
    progress: bool = True
    on_stage: Callable[[str], None] | None = None
    reporter: Reporter | None = None
    before_cleanup: Callable[[Report], None] | None = None
    group: Group = ALONE
    stop: Stop | None = None


@named_by(Options)
def unlearn(
    model: nn.Module,
    forget: Sequence[Mapping],
    retain: Sequence[Mapping],
    config: KUnBRConfig | None = None,
    **options: Any,
) -> Report:
    """Makes `model` forget, in place: warm-up, density, selection, re-insertion, merge, and the measured proof.

    forget, retain: records (see kunbr_fast.data; they need `tokenizer`), samples, or padded Hugging Face batches. Where
    config.objective needs a second answer to each forget prompt, it is encoded from the record as the objective says;
    samples and batches bring it under "alternate".

    Keywords, all optional:
    tokenizer: encodes records, questions and folds.
    unlearned: an M_u of the same architecture made by any method; then there is no warm-up (its weights are copied to
        disk first, and it is not changed).
    forget_questions, retain_questions: records to measure accuracy on (default: the questions among forget and retain).
    folds: what the RTT attack uses; without them, or with config.rtt false, there is no attack.
    output_dir: where `kunbr-checkpoints/` is made (None: a temporary directory); removed at the end of a whole run.
    resume: go on where a run with the same model, data and settings was interrupted: same bits as without.
    overwrite: a streamed model's result replaces a model in output_dir, when it is complete. Of a model in memory
        nothing is written or removed there: before_cleanup does that (`save_model(..., replace=True)`).
    progress: show progress bars (default True).
    on_stage(text): told what begins.
    reporter: a `Reporter` in place of these two; it also has the seconds of each stage.
    before_cleanup(report): called when all is done and the checkpoints are still there: the place to save the model, so
        that a failing save (full disk) can be resumed too. A model that it writes to output_dir is read back:
        ValueError where that is not the one in memory (another dtype is said).
    group: the processes that do this together (`parallel.group.joined`), each calling with the same arguments; then
        output_dir is needed, which all must see. Rank 0 alone reports, calls back and cleans up; all return the report,
        and hold the result.
    stop: a `Stop`, by which a signal's handler or another thread ends the run after a step, with a checkpoint.

    model may be streamed (`open_streamed`), with an `unlearned` that is too. Neither is ever in memory whole: warm-up
    and attack train it layer by layer, a given M_u is not copied, and the result is written to output_dir, from where
    the model is read afterwards. Weights and report are those of the model in memory, bit for bit.

    Returns the `Report`. One model is in memory: M0 waits on disk during the warm-up, M_u during re-insertion.

    Errors, before anything is computed: ValueError for settings, data, and a model of which not every weight may be
    trained (`model.ownership`: a PEFT adapter, a frozen parameter, offloaded weights; unlearned= may be frozen),
    `Unavailable` for config.impl, TypeError for another keyword. On an exception the model holds whatever the stage had
    reached; `Diverged` leaves in the checkpoint folder the last state from which a later step was found good, `Stopped`
    the present one.
    """
    return carry_out(model, forget, retain, config or KUnBRConfig(), taken(Options, options, "unlearn"))


def carry_out(
    model: nn.Module,
    forget: Sequence[Mapping],
    retain: Sequence[Mapping],
    config: KUnBRConfig,
    given: Options,
    command: bool = False,
) -> Report:
    """`unlearn`. command: it is the one of the command line, which has given.output_dir's lock (`files.lock.hold`)
    already, and whose model and tokenizer must be there in the end."""
    model, given = _owned(model, given)
    forget, retain = entries(forget, "forget"), entries(retain, "retain")
    output_dir, group = given.output_dir, given.group
    reporter = given.reporter or Reporter(given.progress, given.on_stage)
    asked = {"forget": _questions(given.forget_questions, forget), "retain": _questions(given.retain_questions, retain)}
    inputs = RunInputs(model, forget, retain, given.tokenizer, given.unlearned, asked, given.folds or ())
    with contextlib.ExitStack() as stack:
        stack.enter_context(frozen(model))
        for source in (model, given.unlearned):
            if source is not None:
                weights_of(source).check_target(output_dir)
        heard = reporter if group.first else reporter.silent()
        folder = None
        if output_dir is not None and group.first:
            folder = stack.enter_context(_begun(model, given, heard, command))
        if output_dir is not None:
            group.wait()  # until the folder is there
            work = Path(output_dir) / NAME
        elif group.size == 1:
            work = stack.enter_context(scratch("kunbr-fast-"))
        else:
            raise ValueError("several processes need an output_dir that all of them see")
        kinds = config.log_to if group.first else ()
        place = output_dir if group.first else None
        log = stack.enter_context(opened(kinds, place, given.resume, config.to_dict()))
        context = RunContext(work, group, heard, given.resume, group.first, group.wait, given.stop or Stop(), log)
        run = Stages(inputs, config, context)
        _open(log, None if given.resume else folder)
        report = run.all()
        run.check_result()  # once more: the attack has put the weights back
        # behind the last step, whose row a process that makes no step any more would otherwise void
        log.add(run.steps_before() + 1, "result", report.figures)
        _save(run, given, folder, report, command)
        group.wait()
        if folder is not None:
            try:
                folder.end(heard.say)
            except OSError as error:  # which is no reason to lose a result that is only in memory
                heard.say(f"the run is finished, but {plain(folder.path)} could not be removed ({error}): delete it")
    return report


def _open(log: RunLog, begun: CheckpointFolder | None) -> None:
    """begun: the folder of a run in which nothing is computed yet. It goes where the log cannot be had, so that the
    command can be given again."""
    try:
        log.open()
    except ValueError:
        if begun is not None:
            begun.end()
        raise


def _save(run: Stages, given: Options, folder: CheckpointFolder | None, report: Report, command: bool) -> None:
    """Writes the result, or has it written, and reads it back while the checkpoints are there."""
    out, streamed = given.output_dir, run.decoder.streamed
    written, back = streamed or command, None
    if folder is not None:
        folder.mark(SAVING)
        if written or given.before_cleanup is not None:
            back = ReadBack(out, run.decoder, run.samples, written, given.tokenizer if command else None)
    try:
        if streamed:
            run.reporter.say(f"writing the model to {out}, in the dtypes of its source, and reading it back")
            run.decoder.save(out, replace=folder is not None and folder.overwrites)
        if given.before_cleanup is not None and given.group.first:
            given.before_cleanup(report)
        if back is not None and (said := back.check()):
            run.reporter.say(said)
        if streamed:
            run.decoder.weights.moved(out)
    except ValueError as error:
        if folder is None or not (written or isinstance(error, NotWritten)):  # what the user's own code raises stays
            raise
        raise NotWritten(f"{error}: the checkpoints are kept, resume (resume=True) writes it again") from error


@contextlib.contextmanager
def _begun(model: nn.Module, given: Options, reporter: Reporter, held: bool) -> Iterator[CheckpointFolder]:
    """The folder of a run that begins or goes on; nobody else works in the output directory meanwhile."""
    output_dir, sources = given.output_dir, {"the model": model, "the unlearned model": given.unlearned}
    places = {what: weights_of(source).directory for what, source in sources.items() if source is not None}
    check_place(output_dir, places)
    with contextlib.nullcontext() if held else hold(output_dir, reporter.say):
        if weights_of(model).streamed:
            check_output(output_dir, places["the model"], given.resume, given.overwrite)
        elif given.overwrite:
            check_not_read(output_dir, model)
        if not given.resume and (old := former_folder(output_dir)):
            reporter.say(
                f"{old} holds checkpoints of an earlier version, which nothing reads any more: delete that folder"
            )
        with CheckpointFolder(output_dir) as folder:
            folder.begin(given.resume, given.overwrite)
            yield folder


def _owned(model: nn.Module, given: Options) -> tuple[nn.Module, Options]:
    """The models without torch.compile's wrapper. ValueError where their owner has not left them to be trained."""
    model = uncompiled(model)
    trainable(model, "kf.unlearn")
    if given.unlearned is not None:
        given = dataclasses.replace(given, unlearned=uncompiled(given.unlearned, "the unlearned model"))
        whole(given.unlearned, "the unlearned model's ")
        no_adapter(given.unlearned, "kf.unlearn", "the unlearned model")
    return model, given


def _questions(given: Sequence[Mapping] | None, records: Sequence[Mapping]) -> list[Mapping]:
    return list(given) if given is not None else [r for r in records if isinstance(r, Mapping) and is_question(r)]
