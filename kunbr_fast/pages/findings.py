"""What a source says in plain words: what was forgotten, came back, was lost; and what that does not show."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from kunbr_fast.evaluation import cautions
from kunbr_fast.evaluation.attacks import ATTACKS
from kunbr_fast.evaluation.curves import RTTResult, Strongest
from kunbr_fast.measures.registry import GROUPS
from kunbr_fast.pages.markup import change, count, figure
from kunbr_fast.pages.sources import Source

NAMES = {
    "original": "original",
    "unlearned": "after the warm-up (M_u)",
    "result": "result",
    "retrained": "retrained",
}
METRICS = {"accuracy": ("plain", "num_questions"), "probability": ("mean", "num_records")}


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a model knows of a set. error: standard error of `value`; change_error: of the change since the original.
    number: of questions or records."""

    metric: str
    value: float
    error: float | None
    number: int
    change_error: float | None = None
    chance: float | None = None
    calibrated: float | None = None
    smooth: float | None = None
    smooth_error: float | None = None

    @property
    def of(self) -> str:
        return count(self.number, "questions" if self.metric == "accuracy" else "records")


def measured(source: Source) -> dict[str, dict[str, Measured]]:
    """{model: {set: what the run found}}; empty without a run's report. Without blocks M_u is the result, and is not
    named."""
    found: dict[str, dict[str, Measured]] = {}
    for metric, (mean, number) in METRICS.items():
        for model, sets in ((source.report or {}).get(metric) or {}).items():
            if model == "unlearned" and not source.report["blocks"]:
                continue
            for what, each in sets.items():
                more = {
                    name: each.get(name) for name in ("change_error", "chance", "calibrated", "smooth", "smooth_error")
                }
                error = each.get(
                    "standard_error", _binomial(each[mean], each[number]) if metric == "accuracy" else None
                )
                found.setdefault(model, {})[what] = Measured(metric, each[mean], error, each[number], **more)
    return found


def _binomial(share: float, number: int) -> float | None:
    """Standard error of a share of questions, sqrt(p (1 - p) / n); None of one question."""
    return (share * (1 - share) / number) ** 0.5 if number > 1 else None


def what_is_measured(metric: str) -> str:
    """The start of a sentence."""
    return "Questions answered correctly" if metric == "accuracy" else "Mean probability of the right answer"


@dataclasses.dataclass(frozen=True)
class Card:
    """title, the figure in large, and a sentence or two. metric: of the figure; two are compared only with the same."""

    title: str
    big: str
    text: str
    metric: str = ""


def cards(source: Source) -> list[Card]:
    """The headline: what was forgotten, what came back, what it cost."""
    found = measured(source)
    first, last = found.get("original", {}), found.get("result", {})
    cards = [card for card in (_forgotten(first, last), _back(source), _cost(first, last)) if card is not None]
    return cards if source.report is not None else _evaluated(source)


def _forgotten(first: Mapping[str, Measured], last: Mapping[str, Measured]) -> Card | None:
    if (now := last.get("forget")) is None:
        return Card("Forgotten", "not measured", "Nobody asked the models about the forget set.")
    kind, before = what_is_measured(now.metric), first.get("forget")
    guess = f"; guessing gives {figure(now.chance)}" if now.chance else ""
    over = f"{now.of} about the forget set{guess}."
    if before is None:
        return Card("Forgotten", figure(now.value, now.error), f"{kind} after unlearning. {over}", now.metric)
    text = f"{kind}, before and after unlearning: {change(now.value - before.value, now.change_error)}. {over}"
    moved = f"{figure(before.value, before.error)} → {figure(now.value, now.error)}"
    return Card("Forgotten", moved, text, now.metric)


def _back(source: Source) -> Card | None:
    if not source.attacks:
        return Card("Came back under attack", "no attack made", "Nobody tried to bring the knowledge back.")
    metric = source.attacks[0][1].metric  # of the run, if that made one
    who, rtt = max((a for a in source.attacks if a[1].metric == metric), key=lambda found: found[1].accuracy)
    attack, lr, epoch = rtt.strongest
    how = f"{attack}, learning rate {lr:g}, epoch {epoch}" if lr else attack
    number = "" if rtt.num_questions is None else f" over {count(rtt.num_questions, questions_of(rtt))}"
    before = figure(rtt.before, before_error(rtt))
    text = (
        f"{what_is_measured(metric)}, on facts that the attack was not shown: {before} before, "
        f"{figure(rtt.accuracy, rtt.standard_error)} after the strongest attack of {who} ({how}){number}."
    )
    return Card("Came back under attack", change(rtt.recovery, rtt.change_error), text, metric)


def questions_of(rtt: RTTResult) -> str:
    return "questions" if rtt.metric == "accuracy" else "records"


def before_error(rtt: RTTResult) -> float | None:
    """The standard error of `rtt.before`."""
    return rtt.error(Strongest(rtt.attacks[0], rtt.lrs[0], 0))


def _cost(first: Mapping[str, Measured], last: Mapping[str, Measured]) -> Card | None:
    now, before = last.get("retain"), first.get("retain")
    if now is None:
        return Card("Change of what was to stay", "not measured", "Nobody asked the models about the retain set.")
    kind, over = what_is_measured(now.metric), f"{now.of} about the retain set."
    if before is None:
        return Card("Kept", figure(now.value, now.error), f"{kind} after unlearning. {over}", now.metric)
    both = f"{figure(before.value, before.error)} before, {figure(now.value, now.error)} after"
    lost = change(now.value - before.value, now.change_error)
    return Card("Change of what was to stay", lost, f"{kind}: {both}. {over}", now.metric)


def _evaluated(source: Source) -> list[Card]:
    """Of an evaluation alone: the first measure of knowledge of each set."""
    found, titles = [], {"forget": "Known of the forget set", "retain": "Known of the retain set"}
    for what, title in titles.items():
        rows = [row for row in source.evaluation["figures"] if row["set"] == what and row["group"] == "knowledge"]
        if not rows:
            continue
        of = {row["model"]: row for row in rows if row["measure"] == rows[0]["measure"]}
        models = [name for name in ("original", "result", "retrained") if name in of]
        said = [figure(of[name]["value"], of[name]["standard_error"], of[name]["unit"]) for name in models]
        names = ", then ".join(NAMES[name] for name in models)
        over = f"{rows[0]['title']}: {names}; over {rows[0]['number']} of the set."
        found.append(Card(title, " → ".join(said), over, rows[0]["measure"]))
    back = [_back(source)] if source.attacks else []
    return [*found[:1], *back, *found[1:]]


# ---------------------------------------------------------------- what they do not show


def warnings(source: Source) -> list[str]:
    """Of the run's report and of the attacks, each once; and what somebody has changed since."""
    found = list((source.report or {}).get("cautions", ()))
    for _, rtt in source.attacks:
        found += cautions.of_attack(rtt)
    found += [
        f"{name} is not what the run wrote: it was edited since; settings here are the report's"
        for name in source.edited
    ]
    if source.report is not None and "result" not in source.report:
        found.append("report.json has no checksum of its own: an earlier version wrote it, or KUnBRTrainer")
    return list(dict.fromkeys(found))


def limits(source: Source) -> list[str]:
    """What the figures do not show: what was not done, and what could not be seen by what was."""
    return [*_of_attacks(source), *_of_samples(source), *_of_measures(source), *_of_all(source)]


def _of_attacks(source: Source) -> Iterator[str]:
    if not source.attacks:
        yield (
            "No attack was made. Low figures on the forget set may mean hidden, not removed: fine-tuning can bring "
            "it back."
        )
        return
    made = {attack for _, rtt in source.attacks for attack in rtt.attacks}
    left = [f"{name} ({kind.says})" for name, kind in ATTACKS.items() if name not in made]
    yield f"Only these attacks were tried: {', '.join(sorted(made))}. Another one may bring back more."
    if left:
        yield f"Not tried, though this version can: {'; '.join(left)}."
    if not made & {name for name, kind in ATTACKS.items() if kind.rounds}:
        yield "Quantised copies of the model were not attacked or asked. Rounding weights can undo unlearning."
    for who, rtt in source.attacks:
        tried = sum(len(rtt.epochs(attack)) - 1 for attack in rtt.attacks for _ in rtt.rates(attack))
        if tried > 1:
            yield (
                f"The strongest attack of {who} is the highest of {tried} points on the same questions. Such a maximum "
                "is biased upwards by chance, and its standard error does not count the choice."
            )
        if rtt.diverged:
            number = count(len(rtt.diverged), "trainings")
            yield f"{number} of the attack diverged and count for nothing: another learning rate may do more."


def _of_samples(source: Source) -> Iterator[str]:
    for model, sets in measured(source).items():
        if model != "result":
            continue
        for what, found in sets.items():
            if found.metric != "accuracy":
                continue
            most = 50 / found.number**0.5
            yield (
                f"{found.of} on the {what} set: the standard error of an accuracy is up to {most:.1f} points. It is "
                "over questions; another seed of the training may differ by more."
            )
            if found.value in (0.0, 1.0):
                rule = 100 * min(1.0, 3 / found.number)
                yield (
                    f"A share of exactly {figure(found.value)} has a standard error of 0, which says little: with "
                    f"{found.of}, a true rate up to {rule:.1f} points away would often look the same."
                )
    chances = {found.chance for sets in measured(source).values() for found in sets.values() if found.chance}
    for chance in sorted(chances):
        yield (
            f"By guessing, {figure(chance)} of the questions are answered correctly, so that is the floor, not 0. Well "
            "below it a model would show that it still knows which answer to avoid."
        )


def _of_measures(source: Source) -> Iterator[str]:
    figures = (source.evaluation or {}).get("figures", ())
    groups = {row["group"] for row in figures}
    left = [group for group in GROUPS if group not in groups]
    if source.evaluation is None:
        yield (
            "kunbr-fast evaluate was not run into this folder: verbatim memorisation, membership inference, "
            "perplexity, and what hidden layers still hold were not measured."
        )
    elif left:
        yield f"No measure of {' and of '.join(left)} was made."
    if missing := (source.evaluation or {}).get("missing"):
        yield f"{count(len(missing), 'measures')} could not be made: the table of measures says why."
    if source.evaluation is None or "retrained" not in source.evaluation["models"]:
        yield "There is no model retrained without the forget set here, so nothing says how near the result is to one."
    if not (source.evaluation or {}).get("lm_eval"):
        yield "General ability was not measured (lm-evaluation-harness): the retain set stands for all that is to stay."
    if source.evaluation is None or "holdout" not in source.evaluation["sets"]:
        yield "Nothing was measured on a holdout set: what is in neither set may have been damaged unseen."


def _of_all(source: Source) -> Iterator[str]:
    yield (
        "The models were asked in the wordings and the language of the question files. Paraphrases, other languages, "
        "longer conversations and prompts made to break a model may find what these questions do not."
    )
    if (seed := source.config.get("seed")) is not None:
        yield f"This is one run, of seed {seed}. Other seeds give other models; several of them would show by how much."
    yield "These are measurements, no proof: nothing here shows that a fact is gone from the weights."
