"""Chats: the text that a template makes, which of it has a loss, and what is refused. The templates are small ones with
the mechanisms of published ones."""

import datetime
import json
import random
import re

import pytest
import tiny_text
import torch
import transformers.utils.chat_template_utils as clock

import kunbr_fast as kf
from kunbr_fast.data import encode
from kunbr_fast.data.chat import chat
from kunbr_fast.data.messages import check_messages
from kunbr_fast.data.text import TextSettings, text_and_spans

DAY = "2024-07-26"
ENDED = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
CHATML = ENDED + PROMPT
# only the turns after the last question have a reasoning block, and other turns lose theirs
LAST_THINKS = (
    "{% set n = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set n.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set content = m.content %}"
    "{% set why = m.reasoning_content or '' %}{% if '</think>' in content %}"
    "{% set why = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and loop.index0 > n.last %}<think>\n{{ why }}\n</think>\n\n{% endif %}"
    "{{ content }}<|end|>\n{% endfor %}" + PROMPT
)
OPENS = CHATML.replace("<|assistant|>", "<|assistant|><think>\n")  # in the generation prompt alone
DROPS = ENDED.replace("m.content", "m.content.split('</think>')[-1]")


def user(text, **keys):
    return {"role": "user", "content": text, **keys}


def said(text, **keys):
    return {"role": "assistant", "content": text, **keys}


def system(text):
    return {"role": "system", "content": text}


ONE = [user("When was Ada Ek born?"), said("1907")]
TWO = [user("Who is Ada Ek? A painter."), said("A painter."), user("Born in 1907, a painter."), said("1907")]
TOLD = [system("Be brief."), *TWO]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_text.tokenizer()


def turns(tokenizer, template, messages, day=DAY):
    """The text, and the texts that have a loss."""
    tokenizer.chat_template = template
    record = {"messages": messages, "_where": "chat.jsonl:7"}
    text, spans, special = text_and_spans(record, tokenizer, "answer", TextSettings(chat_date=day))
    assert not special
    return text, [text[begin:end] for begin, end in spans]


def refused(tokenizer, template, messages):
    with pytest.raises(ValueError) as error:
        turns(tokenizer, template, messages)
    assert str(error.value).isprintable()
    return str(error.value)


# -------------------------------------------------------------------- the day


class NextYear(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2031, 5, 6, 7, 8)


DATED = (
    "  {% set today = strftime_now('%d %b %Y') if strftime_now is defined else 'unknown' %}\n"
    "{% macro day(format) %}{{ strftime_now(format) }}{% endmacro %}"
    "{{ today }}|{{ day('%A 100%% %%Y %-d %H:%M') }}|{{ strftime_now(format='%Y') | int + 1 }}|" + CHATML
)


def test_a_template_has_the_day_that_is_set_and_not_the_clocks(tokenizer, monkeypatch):
    first = turns(tokenizer, DATED, ONE, "2024-07-06")[0]
    assert first.startswith("06 Jul 2024|Saturday 100% %Y 6 00:00|2025|<|user|>")
    (before,) = encode([{"messages": ONE}], tokenizer, "answer", text=TextSettings(chat_date="2024-07-06"))
    monkeypatch.setattr(clock, "datetime", NextYear)
    assert "2031" in tokenizer.apply_chat_template(ONE, tokenize=False)
    assert turns(tokenizer, DATED, ONE, "2024-07-06")[0] == first
    (after,) = encode([{"messages": ONE}], tokenizer, "answer", text=TextSettings(chat_date="2024-07-06"))
    assert torch.equal(before["input_ids"], after["input_ids"]) and torch.equal(before["labels"], after["labels"])
    # and the rest is what the template would write on such a day
    monkeypatch.setattr(NextYear, "now", classmethod(lambda cls: cls(2024, 7, 6)))
    assert tokenizer.apply_chat_template(ONE, tokenize=False) == first


def test_a_run_goes_on_on_another_day(tokenizer, tmp_path, monkeypatch):
    tokenizer.chat_template = DATED
    talks = [{"messages": [user(f"When was {name} born?"), said("1907")]} for name in tiny_text.NAMES[:4]]
    quick = dict(num_blocks=2, top_k=1, skip_last_layers=0, warmup_epochs=1, block_epochs=1, rtt=False)

    def run(**more):
        given = tiny_text.model(layers=2), talks[:2], talks[2:], kf.KUnBRConfig(**quick | more.pop("config", {}))
        return kf.unlearn(*given, tokenizer=tokenizer, output_dir=tmp_path, progress=False, **more)

    def stopped(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr("kunbr_fast.run.stages.Stages.density", stopped)
        with pytest.raises(KeyboardInterrupt):
            run()
    monkeypatch.setattr(clock, "datetime", NextYear)
    with pytest.raises(ValueError, match="chat_date was '2024-07-26' and is '2024-07-27' now"):
        run(resume=True, config={"chat_date": "2024-07-27"})
    assert len(run(resume=True).blocks) == 1


def test_a_templates_own_default_date_stays(tokenizer):
    own = (
        "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ date_string }}" + CHATML
    )
    assert turns(tokenizer, own, ONE, "2025-01-01")[0].startswith("26 Jul 2024<|user|>")


@pytest.mark.parametrize("date", ["26 Jul 2024", "20240726", "2024-W30-5", "2024-02-30", "", None, 5])
def test_a_day_that_is_none_is_refused(date):
    with pytest.raises(ValueError, match="^chat_date=.*: expected a day as YYYY-MM-DD, such as 2024-07-26$"):
        TextSettings(chat_date=date)
    with pytest.raises((ValueError, TypeError), match="chat_date"):
        kf.KUnBRConfig(chat_date=date)


# -------------------------------------------------------------------- where the assistant's turns stand


@pytest.mark.parametrize(
    "template, last",
    [
        (CHATML, "<|end|>\n"),
        (OPENS, "<|end|>\n"),
        (LAST_THINKS, "<|end|>\n"),
        (DROPS, "<|end|>\n"),
        (ENDED.replace("m.content", "m.content | trim"), "<|end|>\n"),
        (ENDED + "<|endoftext|>", "<|end|>\n<|endoftext|>"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "\n"),
    ],
)
def test_the_assistants_own_text_has_the_loss(tokenizer, template, last):
    middle = last.removesuffix("<|endoftext|>")
    assert turns(tokenizer, template, ONE)[1] == ["1907" + last]
    for messages in (TWO, TOLD):
        assert turns(tokenizer, template, messages)[1] == ["A painter." + middle, "1907" + last]
        if template is not DROPS:
            assert turns(tokenizer, template, [*messages, user("Thanks. 1907")])[1] == [
                "A painter." + middle,
                "1907" + middle,
            ]


def test_a_mark_that_begins_like_the_turns_end_has_no_loss(tokenizer):
    """The chat ends in <|endoftext|>, an earlier turn in <|user|>: neither of its characters is the turn's."""
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|endoftext|>"
    assert turns(tokenizer, template, TWO)[1] == ["A painter.", "1907<|endoftext|>"]


@pytest.mark.parametrize("trim, lead, kept", [("", "\n ", " \n"), (" | trim", "", ""), (".lstrip('\n')", " ", " \n")])
def test_whitespace_around_a_content(tokenizer, trim, lead, kept):
    template = ENDED.replace("m.content", f"m.content{trim}")
    messages = [user(" a\n"), said("\n b \n"), user("c"), said("d")]
    assert turns(tokenizer, template, messages)[1] == [f"{lead}b{kept}<|end|>\n", "d<|end|>\n"]
    assert turns(tokenizer, template, messages[:2])[1] == [f"{lead}b{kept}<|end|>\n"]
    # the template's own stays its own
    opened = template.replace("|>{{", "|>\n {{")
    assert turns(tokenizer, opened, messages[:2])[1] == [f"{lead}b{kept}<|end|>\n"]


def test_reasoning_that_the_template_writes_has_the_loss(tokenizer):
    thought = "<think>\nHm, so.\n</think>\n\n1907"
    assert turns(tokenizer, LAST_THINKS, [ONE[0], said(thought)])[1] == [f"{thought}<|end|>\n"]
    assert turns(tokenizer, CHATML, [ONE[0], said(thought), *ONE])[1] == [f"{thought}<|end|>\n", "1907<|end|>\n"]
    # whitespace around the tags is the template's
    (whole,) = turns(tokenizer, LAST_THINKS, [ONE[0], said("<think>Hm, so.</think>1907")])[1]
    assert whole == f"{thought}<|end|>\n"
    # a key of its own: from the end of the generation prompt on
    keyed = [ONE[0], said("1907", reasoning_content="Hm, so.", tool_calls=[], name=None)]
    assert turns(tokenizer, LAST_THINKS, keyed)[1] == [f"{thought}<|end|>\n"]
    opened = LAST_THINKS.replace(PROMPT, PROMPT.replace("<|assistant|>", "<|assistant|><think>\n"))
    assert turns(tokenizer, opened, keyed)[1] == [f"{thought.removeprefix('<think>')[1:]}<|end|>\n"]


def test_calls_of_tools_have_the_loss(tokenizer):
    template = ENDED.replace(
        "<|end|>",
        "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|end|>",
    )
    call = {"type": "function", "function": {"name": "look", "arguments": {"q": "Ada Ek"}}}
    talk = [ONE[0], said("", tool_calls=[call]), {"role": "tool", "content": "1907"}, said("In 1907.")]
    text = '<call>{"name": "look", "arguments": {"q": "Ada Ek"}}</call><|end|>\n'
    assert turns(tokenizer, template + PROMPT, talk)[1] == [text, "In 1907.<|end|>\n"]
    # what the template adds before it, the end of a block that the prompt has opened, has none
    thinks = LAST_THINKS.replace(
        "{{ content }}", "{{ content }}{% for c in m.tool_calls or [] %}<call>{{ c }}</call>{% endfor %}"
    )
    for template in (thinks, thinks.replace(PROMPT, PROMPT.replace("<|assistant|>", "<|assistant|><think>\n"))):
        for content in ("", "So:"):
            called = [ONE[0], said(content, tool_calls=["f"])]
            assert turns(tokenizer, template, called)[1] == [f"{content}<call>f</call><|end|>\n"]
    # exports have the key where nothing is called; a template that asks for the key alone
    strict = ENDED.replace("<|end|>", "{{ m.tool_calls[0].name + '' if 'tool_calls' in m }}<|end|>")
    assert turns(tokenizer, strict, [ONE[0], said("1907", tool_calls=[])])[1] == ["1907<|end|>\n"]


def test_a_turn_that_ends_otherwise_in_the_middle_has_its_end(tokenizer):
    ends = "{{ '<|return|>' if loop.last and not add_generation_prompt and m.role == 'assistant' else '<|end|>' }}"
    template = "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}" + ends + "{% endfor %}"
    template += "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    assert turns(tokenizer, template, ONE)[1] == ["1907<|return|>"]
    assert turns(tokenizer, template, TOLD)[1] == ["A painter.<|end|>", "1907<|return|>"]
    assert turns(tokenizer, template, [*TWO, user("a")])[1] == ["A painter.<|end|>", "1907<|end|>"]


INDEXED = "{% for m in messages %}<{{ m.role }} {{ loop.index }}>{{ m.content }} [{{ loop.index }}]\n{% endfor %}### 0"
ADDED = INDEXED.replace("{{ m.content }}", "{% generation %}{{ m.content }} 5{% endgeneration %}")


@pytest.mark.parametrize(
    "template, content, keys, number",
    [
        (INDEXED, "Born in 1921.", {}, "1921"),
        (CHATML.replace("<|end|>", "<extra_id_1>"), "In 1921.", {}, "1921"),
        (ADDED, "1921!", {}, "1921"),
        (CHATML, "<think>1921?</think>No 7, or 8?", {}, "8"),
        (LAST_THINKS, "<think>1921?</think>No idea.", {}, None),
        (LAST_THINKS, "No idea.", {"reasoning_content": "1921?"}, None),
        (CHATML, "1921?</think>No idea.", {}, None),
        (CHATML, "1921 <think>or 1922", {}, "1921"),
        (CHATML, "[THINK]1921[/THINK]<b>1922</b>", {}, "1922"),
        (CHATML, "<|START_THINKING|>1921<|END_THINKING|>No", {}, None),
        (CHATML, "<|begin_of_thought|>19<|end_of_thought|>20", {}, "20"),
        (INDEXED, "I do not know.", {}, None),
        (CHATML.replace("m.content", "m.content ~ (m.tool_calls or '')"), "", {"tool_calls": [1921]}, None),
    ],
)  # fmt: skip
def test_the_number_stands_in_the_last_turns_content(tokenizer, template, content, keys, number):
    tokenizer.chat_template = template
    record = {"messages": [*TWO, user("When, if not in 1907?"), said(content, **keys)], "_where": "chat.jsonl:7"}
    if number is None:
        with pytest.raises(ValueError, match="^chat.jsonl:7: target='number' but there is no digit in the answer"):
            text_and_spans(record, tokenizer, "number", TextSettings())
        return
    text, [(begin, end)], _ = text_and_spans(record, tokenizer, "number", TextSettings())
    assert text[begin:end] == number and begin > text.index("if not in 1907")


MARKED = (
    "{% macro turn(m) %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}<think></think>{{ m.content }}"
    "<|end|>{% endgeneration %}\n{% else %}{{ m.content }}<|end|>\n{% endif %}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}"
)


def test_generation_marks_are_the_turns(tokenizer):
    plainly = MARKED[MARKED.index("<|{{") : MARKED.index("{% endmacro")]
    plainly = "{% for m in messages %}" + plainly + "{% endfor %}"
    for template in (MARKED, plainly, plainly.replace("{% generation %}", "{%- generation -%}\n  ")):
        text, own = turns(tokenizer, template, TWO)
        assert own == ["<think></think>A painter.<|end|>", "<think></think>1907<|end|>"]
    # the same tokens as transformers' own mask, where that is right (not in a macro)
    tokenizer.chat_template = plainly
    whole = tokenizer.apply_chat_template(TWO, return_dict=True, return_assistant_tokens_mask=True)
    (sample,) = encode([{"messages": TWO}], tokenizer, "answer")
    assert sample["input_ids"].tolist() == whole["input_ids"]
    assert (sample["labels"] != -100).int().tolist() == whole["assistant_masks"]


def test_generation_marks_may_ask_for_a_key(tokenizer):
    template = CHATML.replace(
        "{{ m.content }}",
        "{% if m.train %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}",
    )
    one, two = [user("a"), said("b", train=False)], [user("c"), said("5", train=True)]
    assert turns(tokenizer, template, [*one, *two])[1] == ["5"]
    assert turns(tokenizer, template, [*two, *one])[1] == ["5"]


def test_any_contents_are_found_where_they_stand(tokenizer):
    """Contents that are alike, or like what the template writes, in turns of any number."""
    words = [
        "a",
        "<|user|>",
        "<|end|>",
        "assistant",
        "\n",
        " ",
        "<think>",
        "</think>",
        "Zq0z",
        "{{ 1 }}",
        "é",
        "[/INST]",
        "\\1",
    ]
    draw = random.Random(0)
    for count in range(60):
        contents = ["".join(draw.choices(words, k=draw.randint(1, 4))) or "a" for _ in range(2 * draw.randint(1, 3))]
        contents = [content if content.strip() else "b" for content in contents]
        messages = [said(text) if i % 2 else user(text) for i, text in enumerate(contents)]
        text, expected = "", []
        for i, content in enumerate(contents):
            text += f"<|{'assistant' if i % 2 else 'user'}|>"
            if i % 2:
                expected.append((len(text), len(text) + len(content) + len("<|end|>\n")))
            text += f"{content}<|end|>\n"
        tokenizer.chat_template = CHATML
        made = chat({"messages": messages, "_where": f"record {count}"}, tokenizer, DAY)
        assert (made.text, made.turns) == (text, expected)
        assert text[slice(*made.last)].strip() == contents[-1].strip()


# -------------------------------------------------------------------- what would be lost

NO_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
LAST_USER = "{% set messages = messages[-2:] %}" + CHATML
KNOWN = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role in ('user', 'assistant') %}")
PARTS = CHATML.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")
CUT = CHATML.replace("m.content", "(m.content[:9] if m.role == 'user' else m.content)")
UPPER = CHATML.replace("m.content", "m.content.upper()")
SHOUTED = CHATML.replace("m.content", "(m.content.upper() if m.role == 'assistant' else m.content)")
NAMED = CHATML.replace("{{ m.content", "{{ 'by name: ' if m.name }}{{ m.content")  # says only that there is one
TWICE = CHATML.replace("{{ m.content }}", "{{ m.content }} {{ m.content }}")
ANSWERS = "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}{{ m.content }}\n{% endfor %}"
ASKS = "{% for m in messages %}{{ 'A: ' if m.role == 'assistant' else 'Q: ' }}{{ m.content }}\n{% endfor %}"
THOUGHT = said("<think>\nHm.\n</think>\n\n1907")


@pytest.mark.parametrize(
    "template, messages, message, what",
    [
        (NO_SYSTEM, TOLD, "1 of 5 (system)", "leaves it out: leave it out, or put its text into another message"),
        (LAST_USER, TWO, "1 of 4 (user)", "leaves it out"),
        (KNOWN, [*ONE, {"role": "tool", "content": "1907"}, said("1907")], "3 of 4 (tool)", "leaves it out"),
        (PARTS, TWO, "1 of 4 (user)", "takes contents in parts only, not as text: take another"),
        (CUT, TWO, "1 of 4 (user)", "leaves out a part of it (['Ada', 'Ek', "),
        (UPPER, ONE, "1 of 2 (user)", "leaves out a part of it"),
        (SHOUTED, TWO, "2 of 4 (assistant)", "does not write it as it stands"),
        (TWICE, ONE, "2 of 2 (assistant)", "writes it 2 times"),
        (DROPS, [ONE[0], THOUGHT], "2 of 2 (assistant)", "its reasoning (<think>) as it stands: give it without"),
        (LAST_THINKS, [ONE[0], THOUGHT, *ONE], "2 of 4 (assistant)", "or make it the last turn of a record of its own"),
        (CHATML, [ONE[0], said("1", reasoning_content="a")], "2 of 2 (assistant)", "not read its 'reasoning_content'"),
        (CHATML, [ONE[0], said("1907", weight=0)], "2 of 2 (assistant)", "have a loss alike: split the chat"),
        (CHATML, [user("a", name="Bo", id=5, _note="x"), said("b")], "1 of 2 (user)", "does not read its 'name'"),
        (LAST_THINKS, [ONE[0], said("1", reasoning_content="a"), *ONE], "2 of 4 (assistant)", "not read its 'reas"),
        (NAMED, [user("a", name="Bo"), said("b")], "1 of 2 (user)", "does not read its 'name'"),
        (CHATML, [user("a", train=True), said("b")], "1 of 2 (user)", "have a loss alike: split the chat"),
        (CHATML, [user("a"), said("b", loss_weight=0.5)], "2 of 2 (assistant)", "have a loss alike: split the chat"),
        (CHATML, [user("a"), said("b", lossMask=1)], "2 of 2 (assistant)", "have a loss alike: split the chat"),
        (CHATML, [user("a"), said("b", no_loss=True)], "2 of 2 (assistant)", "have a loss alike: split the chat"),
        (ANSWERS, [*TWO, {"role": "model", "content": "x"}], "5 of 5 (model)", "as 'assistant': give it the role"),
        (ANSWERS, [*ONE, {"role": "tool", "content": "x"}, said("y")], "3 of 4 (tool)", "this role as 'assistant'"),
        (ANSWERS, TOLD, "1 of 5 (system)", "writes this role as 'assistant'"),
        (ASKS, [*TWO, {"role": "gpt", "content": "x"}], "5 of 5 (gpt)", "writes this role as 'user'"),
    ],
)  # fmt: skip
def test_what_a_template_would_lose_is_refused(tokenizer, template, messages, message, what):
    said = refused(tokenizer, template, messages)
    assert said.startswith(f"chat.jsonl:7: message {message}: the chat template of ") and what in said
    assert said.endswith(", or use prompt + completion")


SYSTEM_IN_USER = (  # the system's message stands in the last question
    "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST] "
    "{% if loop.index >= loop.length - 1 and s %}{{ s }}\n\n{% endif %}"
    "{{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)


def test_what_is_written_elsewhere_or_in_another_form_is_not_lost(tokenizer):
    own = ["A painter.</s>", "1907</s>"]
    assert turns(tokenizer, SYSTEM_IN_USER, TOLD)[1] == turns(tokenizer, SYSTEM_IN_USER, TWO)[1] == own
    escaped = CHATML.replace("{{ m.content }}", "{{ m.content | tojson if m.role == 'tool' else m.content }}")
    tool = {"role": "tool", "content": 'a "b"\nc'}
    assert turns(tokenizer, escaped, [*ONE, tool, said("d")])[1] == ["1907<|end|>\n", "d<|end|>\n"]
    # a word that is a command to the template, which writes what it does
    read = "{{ m.content.replace('/no_think', '') }}{{ ' (mode: /no_think)' if '/no_think' in m.content }}"
    command = CHATML.replace("{{ m.content }}", read)
    assert turns(tokenizer, command, [system("Be brief. /no_think"), *ONE])[1] == ["1907<|end|>\n"]
    # a template that writes no roles
    bare = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    assert turns(tokenizer, bare, TOLD)[1] == ["A painter.\n", "1907\n"]
    # what is always so
    plainly = [
        user("a", train=False, weight=0),
        said("b", train=True, weight=1),
        user("c", loss=False),
        said("d", loss=1.0),
    ]
    assert turns(tokenizer, CHATML, plainly)[1] == ["b<|end|>\n", "d<|end|>\n"]
    # annotations, as of a record
    assert turns(tokenizer, CHATML, [user("a", id=5, _note="x"), said("b", source="c")])[1] == ["b<|end|>\n"]
    assert turns(tokenizer, LAST_THINKS, [user("a"), said("b", source="c")])[1] == ["b<|end|>\n"]
    # blank ones say nothing
    silent = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.content %}")
    assert turns(tokenizer, silent, [system(""), *ONE])[1] == ["1907<|end|>\n"]
    # a content of the stand-in's form
    assert turns(tokenizer, CHATML, [user("Zq0z Zq1z"), said("Zq1z")])[1] == ["Zq1z<|end|>\n"]


ROLES = ["Assistant", "assistant ", "ASSISTANT:", "asistant", "gpt", "GPT-4", "model", "bot", "AI", "Chatbot"]


@pytest.mark.parametrize("role", ROLES)
def test_other_names_of_the_assistant_are_refused(tmp_path, role):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [ONE[0], {"role": role, "content": "1921"}, *ONE]}))
    with pytest.raises(ValueError, match=f"chat.jsonl:1: message 2 of 4 has the role '{role}', .*: write 'assistant'"):
        kf.load_records(path)


def test_other_roles_are_not_the_assistants():
    for role in ("human", "developer", "tool", "critic", "assistant_tool", "模型", ""):
        check_messages([{"role": role, "content": "a"}, *ONE], "here")


def test_messages_of_a_tool_as_apis_want_them(tokenizer, tmp_path):
    path, call = tmp_path / "chat.jsonl", {"id": "c1", "type": "function", "function": {"name": "look"}}
    answer = {
        "role": "tool",
        "content": "1907",
        "tool_call_id": "c1",
        "name": "look",
        "index": 0,
        "id": "x",
        "type": "y",
    }
    calls = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls[0].function.name if m.tool_calls }}")
    talk = [ONE[0], said("", tool_calls=[call]), answer, said("In 1907.")]
    assert turns(tokenizer, calls, talk)[1] == ["look<|end|>\n", "In 1907.<|end|>\n"]
    # one that the template reads is there
    named = calls.replace("{{ m.content }}", "{{ m.name or '' }}: {{ m.content }}")
    assert "<|tool|>look: 1907" in turns(tokenizer, named, talk)[0]
    # any key of a message can be left out, but for those that it must have
    path.write_text(json.dumps({"messages": [user("a", name="Bo"), said("b", reasoning_content="c")]}))
    tokenizer.chat_template = CHATML
    with pytest.raises(ValueError, match=r"message 1 of 2 .user.*'name': leave 'name' out .--ignore-keys"):
        encode(kf.load_records(path), tokenizer, "answer")
    (record,) = kf.load_records(path, ignore_keys=["name", "reasoning_content", "content"])
    assert record["messages"] == [user("a"), said("b")]
    # what has no content says so
    for message in ({"role": "assistant", "tool_calls": [call]}, said(None, tool_calls=[call])):
        path.write_text(json.dumps({"messages": [ONE[0], message]}))
        with pytest.raises(
            ValueError, match=r'chat.jsonl:1: .*message 2 of 2 is .*it has no content: write "content": ""'
        ):
            kf.load_records(path)


def test_chats_without_an_assistant_or_a_template(tokenizer):
    for messages in (
        [user("a")],
        [user("a"), said(" \n")],
        [user("a"), said("\u200b\n")],
        [user("a"), {"role": "Assistant", "content": "b"}],
    ):
        assert "chat.jsonl:7: no assistant message to learn from" in refused(tokenizer, CHATML, messages)
    assert "chat.jsonl:7: 'messages' need a tokenizer with a chat template" in refused(tokenizer, None, ONE)
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('user\nfirst') }}{% endif %}" + CHATML
    assert len(turns(tokenizer, strict, ONE)[1]) == 1
    assert re.match("chat.jsonl:7: .*user.*change the messages, or", refused(tokenizer, strict, ONE[::-1]))
    tokenizer.chat_template = CHATML
    with pytest.raises(ValueError, match="chat.jsonl:7: target='letter' needs question lines"):
        encode([{"_where": "chat.jsonl:7", "messages": ONE}], tokenizer, "letter")
