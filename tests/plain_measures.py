"""What `evaluate` should find, plainly: transformers' forward on one text at a time, full logits, fp64, no packing, and
each figure's formula over that. A model that remembers what it ran before is copied for each text."""

import copy
import math
import re
import zlib

import numpy as np
import torch
from scipy.stats import ks_2samp

LETTERS = "ABCD"


class Said:
    """One text: log p of the tokens that count, given all before them, and what was more probable."""

    def __init__(self, model, tokenizer, pieces):
        columns = [[], [], [], [], []]
        for ids, counts in pieces:
            log_p = logits_of(model, ids).log_softmax(-1)
            for at in counts:
                row = log_p[at - 1]
                mean = float((row.exp() * row).sum())
                deviation = math.sqrt(float((row.exp() * (row - mean) ** 2).sum()))
                told = (float(row[ids[at]]), int(row.argmax()) == ids[at], mean, deviation, ids[at])
                for column, value in zip(columns, told):
                    column.append(value)
        self.log_p, self.greedy, self.means, self.deviations, self.ids = columns
        self.text = tokenizer.decode(self.ids, skip_special_tokens=True).strip()

    @property
    def loss(self):
        return -sum(self.log_p) / len(self.log_p)


@torch.no_grad()
def logits_of(model, ids):
    return copy.deepcopy(model)(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()


def text_of(record, tokenizer):
    """The text, and where its answer begins; of a text line 0."""
    if "text" in record:
        return record["text"], 0
    if "prompt" in record:
        return record["prompt"] + record["completion"], len(record["prompt"])
    text = tokenizer.apply_chat_template(record["messages"], tokenize=False)
    return text, text.index(record["messages"][-1]["content"])


def pieces_of(record, tokenizer, max_length=None):
    """[(ids, places of the tokens that count)]: the tokens that share a character with the answer; of a line of more
    than max_length tokens equal pieces, each of which begins with the last token of the one before."""
    text, first = text_of(record, tokenizer)
    found = tokenizer(text, return_offsets_mapping=True)
    ids = found["input_ids"]
    counts = [t for t, (_, end) in enumerate(found["offset_mapping"]) if t and end > first]
    if max_length is None or len(ids) <= max_length:
        return [(ids, counts)]
    number = math.ceil((len(ids) - 1) / (max_length - 1))
    bounds = [i * (len(ids) - 1) // number for i in range(number + 1)]
    return [(ids[a : b + 1], range(1, b - a + 1)) for a, b in zip(bounds, bounds[1:])]


class Answers:
    """What a model says of a set of items: of each its answer, that in other words, and wrong ones."""

    def __init__(self, model, tokenizer, items, max_length=None):
        def said(record):
            return Said(model, tokenizer, pieces_of(record, tokenizer, max_length))

        self.own, self.right, self.wrong, self.questions = [], [], [], []
        for item in items:
            record = item.record
            if "question" in record:
                asked = [{"prompt": record["question"], "completion": f" {choice}"} for choice in record["choices"]]
                every = [said(one) for one in asked]
                self.own.append(every.pop(record["answer"]))
                self.right.append(self.own[-1])
                self.wrong.append(every)
                self.questions.append(Question(model, tokenizer, record))
            else:
                self.own.append(said(record))
                other = item.paraphrase
                self.right.append(self.own[-1] if other is None else said(answered(record, other)))
                self.wrong.append([said(answered(record, text)) for text in item.perturbed])
        pool = list(dict.fromkeys(str(c) for i in items if "question" in i.record for c in i.record["choices"]))
        self.smooth = [question.smooth(model, tokenizer, pool) for question in self.questions]

    def ratios(self):
        """R of the items that have wrong answers."""
        both = [(right, wrong) for right, wrong in zip(self.right, self.wrong) if wrong]
        return [math.exp(right.loss - sum(w.loss for w in wrong) / len(wrong)) for right, wrong in both]


def answered(record, answer):
    if "messages" in record:
        return {"messages": [*record["messages"][:-1], {**record["messages"][-1], "content": answer}]}
    return {**record, "completion": answer}


class Question:
    def __init__(self, model, tokenizer, record):
        self.record, self.answer = record, record["answer"]
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, record["choices"])]
        prompt = "\n".join([record["question"], *lines, "Answer:"])
        behind = logits_of(model, tokenizer(prompt)["input_ids"])[-1]
        letters = [tokenizer(f"{prompt} {letter}")["input_ids"][-1] for letter in LETTERS]
        self.letters = behind[letters]
        self.choices = [self.log_p(model, tokenizer, choice) for choice in record["choices"]]

    def log_p(self, model, tokenizer, choice):
        ids = tokenizer(f"{self.record['question']} {choice}")["input_ids"]
        first = len(tokenizer(self.record["question"])["input_ids"])
        log_p = logits_of(model, ids).log_softmax(-1)
        return sum(float(log_p[at - 1, ids[at]]) for at in range(first, len(ids)))

    def smooth(self, model, tokenizer, pool):
        """C(r, c - 1) / C(n, c - 1): n wrong candidates, numbers for a number, of which r are less probable."""
        right, mine = self.choices[self.answer], [str(choice) for choice in self.record["choices"]]
        kind = re.fullmatch(r"\d+", mine[self.answer]) is not None
        others = [text for text in pool if (re.fullmatch(r"\d+", text) is not None) == kind and text not in mine]
        wrong = [p for i, p in enumerate(self.choices) if i != self.answer]
        wrong += [self.log_p(model, tokenizer, text) for text in others]
        less = sum(p < right for p in wrong)
        return math.comb(less, len(mine) - 1) / math.comb(len(wrong), len(mine) - 1)


def auc(members, others):
    pairs = [(m > o) + (m == o) / 2 for m in members for o in others]
    return sum(pairs) / len(pairs)


def lowest(values):
    return float(np.mean(sorted(values)[: max(1, int(0.4 * len(values)))]))


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else None


def tail(said):
    """The greedy tokens at the end."""
    return next((i for i, greedy in enumerate(reversed(said.greedy)) if not greedy), len(said.greedy))


def figures(model, tokenizer, sets, retrained=None, max_length=None):
    """{(measure, set): value} of all measures that likelihoods make, of what there is."""
    every = {name: Answers(model, tokenizer, items, max_length) for name, items in sets.items()}
    found = {}
    for name, said in every.items():
        ratios = said.ratios()
        against = [(own, wrong) for own, wrong in zip(said.own, said.wrong) if wrong]
        nats = sum(-sum(one.log_p) for one in said.own)
        means = torch.stack([q.letters for q in said.questions]).mean(0) if said.questions else 0
        of = {
            "accuracy_letter": mean(int(q.letters.argmax()) == q.answer for q in said.questions),
            "accuracy_letter_calibrated": mean(int((q.letters - means).argmax()) == q.answer for q in said.questions),
            "accuracy_choice": mean(max(range(4), key=q.choices.__getitem__) == q.answer for q in said.questions),
            "accuracy_smooth": mean(said.smooth),
            "probability": mean(math.exp(-one.loss) for one in said.own),
            "probability_against_wrong": mean(
                math.exp(-own.loss) / sum(math.exp(-one.loss) for one in [own, *wrong]) for own, wrong in against
            ),
            "truth_share": mean(1 / (1 + ratio) for ratio in ratios),
            "exact_memorisation": mean(mean(one.greedy) for one in said.own),
            "extraction_strength": mean(tail(one) / len(one.greedy) for one in said.own),
            "leak": mean(1 - (1 - math.exp(sum(one.log_p))) ** 64 for one in said.own),
            "perplexity": math.exp(nats / sum(len(one.log_p) for one in said.own)),
        }
        if name == "forget":
            of["truth_ratio"] = mean(min(ratio, 1 / ratio) for ratio in ratios)
        else:
            of["truth_ratio_kept"] = mean(max(0, 1 - ratio) for ratio in ratios)
        found |= {(measure, name): value for measure, value in of.items() if value is not None}
    if "holdout" in every:
        found |= privacy(every["forget"].own, every["holdout"].own)
    if retrained is not None:
        other = {name: Answers(retrained, tokenizer, items, max_length) for name, items in sets.items()}
        ratios = [one["forget"].ratios() for one in (every, other)]
        found["forget_quality", "forget"] = ks_2samp(*ratios).pvalue
        if "holdout" in every:
            scores = [
                [b.loss - a.loss for a, b in zip(every[name].own, other[name].own)] for name in ("forget", "holdout")
            ]
            found["mia_reference", "forget"] = auc(*scores)
            own, seen = (
                auc(*([lowest(a.log_p) for a in one[name].own] for name in ("forget", "holdout")))
                for one in (every, other)
            )
            found["privleak", "forget"] = ((1 - own) - (1 - seen)) / (1 - seen)
    return found


def privacy(members, others):
    scores = {
        "mia_loss": lambda one: -one.loss,
        "mia_zlib": lambda one: -one.loss / len(zlib.compress(one.text.encode())),
        "mia_min_k": lambda one: lowest(one.log_p),
        "mia_min_k_plus_plus": lambda one: lowest(
            [(p - m) / max(d, 1e-3) for p, m, d in zip(one.log_p, one.means, one.deviations)]
        ),
    }
    return {
        (name, "forget"): auc(*(list(map(score, of)) for of in (members, others))) for name, score in scores.items()
    }
