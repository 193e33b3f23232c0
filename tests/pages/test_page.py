"""Pages of runs: what is in them, that no text becomes markup, the same bytes twice, and what is refused."""

import json
import re
from html.parser import HTMLParser

import folders
import pytest

from kunbr_fast.cli.command import main
from kunbr_fast.evaluation.figures import COLOURS
from kunbr_fast.files.checksums import write_sealed
from kunbr_fast.files.target import is_page
from kunbr_fast.pages import charts, markup
from kunbr_fast.pages.charts import Bars, Chart, Series
from kunbr_fast.pages.page import write_page
from kunbr_fast.pages.sources import read

VOID = {"meta", "link", "br"}
SVG = {"svg", "path", "rect", "circle", "polygon", "g", "text"}
TAGS = (
    SVG
    | VOID
    | set(
        "html head title style body header nav main footer section div h1 h2 h3 p ul li a dl dt dd table caption thead "
        "tbody tr th td details summary figure figcaption span code bdi".split()
    )
)
ATTRIBUTES = set(
    "lang charset name content http-equiv rel href id class scope role tabindex aria-label aria-hidden dir style "
    "viewbox d x y r cx cy width height points text-anchor stroke-dasharray".split()
)
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onload='x",
    "]]><![CDATA[",
    "<!-- -->",
    "&lt;b&gt;",
    "x" * 5000,
    "سلام דוד",
    "👩‍👩‍👧",
    "a\0b",
    "\u202egnp.exe",
    "\x1b[31mred",
    "javascript:alert(1)",
    "</style></title></svg>",
]


class Page(HTMLParser):
    """Every tag closed in order; texts by tag; attributes."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.texts, self.headings = [], set(), [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append((int(self.open[-1][1]), data))

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")

    def unknown_decl(self, data):
        raise AssertionError(f"a declaration: {data}")

    @property
    def text(self):
        return " ".join(" ".join(self.texts).replace("\xa0", " ").split())


def page(folder, *more, title=None):
    path = folder.parent / "page.html"
    write_page([folder, *more], path, title)
    text = path.read_text()
    found = Page(text)
    check(found, text)
    return found


def check(found, text):
    """Of every page: known tags and attributes alone, unique ids, nothing that is loaded, headings in order."""
    assert found.tags <= TAGS and {name for _, name, _ in found.attributes} <= ATTRIBUTES
    ids = [value for _, name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = [value for tag, name, value in found.attributes if name == "href"]
    assert {*links} <= {"data:,", *(f"#{one}" for one in ids)} and len(links) == len(ids) + 1
    assert not re.search(r"url\(|@import|https?://", text)
    levels = [level for level, _ in found.headings]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:]))
    assert ("html", "lang", "en") in found.attributes


@pytest.fixture
def whole(tmp_path):
    return folders.whole(tmp_path / "OUT")


def headings(found):
    return [text for level, text in found.headings if level == 2]


EVERY = [
    "In short",
    "What was asked",
    "Before and after",
    "Retained and lost",
    "What comes back under attack",
    "Examples",
    "Where the knowledge sits",
    "Losses by stage",
    "Layer by layer, sample by sample",
    "All measures",
    "General ability",
    "Seconds a stage",
    "Versions and checksums",
    "What these figures do not show",
]


def test_all_that_there_is(whole):
    found = page(whole)
    assert headings(found) == EVERY
    for text in (
        "95.0 ± 2.4 % → 27.5 ± 5.0 %",
        "−67.5 ± 5.2 points",
        "guessing gives 25.0 %",  # sqrt(p (1 - p) / 80)
        "−5.0 ± 2.0 points",
        "full (all weights, on the other folds)",
        "re-inserted and trained",
        "0–1",
        "layers 0–1",
        "rouge l recall",
        "extraction_strength",
        "the holdout set has no text lines",
        "mmlu",
        "−1.0 ± 0.6 points",
        "When was Ada born?",
        "after the attack",
        "74.8",
        "model.safetensors (the result)",
        "d" * 32,
        "9" * 64,
        "8" * 64,
        "Not tried, though this version can: wide",
        "No measure of privacy was made.",
        "original: forget",
        "(nothing)",
        "top_k",
    ):
        assert text in found.text, text
    rows = [row for row in folders.curves().summary("full").items()]
    assert dict(rows)["accuracy"] == pytest.approx(21.5 / 40)
    assert "+27.5 points" in found.text and "53.8 ± 5.6 %" in found.text  # (21.5 - 10.5) / 40; its error by hand:
    assert 100 * sum(p * (1 - p) / 40 for p in (21 / 40, 22 / 40)) ** 0.5 / 2 == pytest.approx(5.5727, abs=1e-3)


def test_a_run_alone_says_what_was_not_done(tmp_path):
    found = page(folders.run(tmp_path / "OUT", folders.report(rtt=False)))
    assert headings(found) == [
        name
        for name in EVERY
        if name
        not in (
            "What comes back under attack",
            "Examples",
            "Layer by layer, sample by sample",
            "All measures",
            "General ability",
        )
    ]
    for text in ("no attack made", "No attack was made.", "kunbr-fast evaluate was not run", "no model retrained"):
        assert text in found.text


def test_an_evaluation_alone(tmp_path):
    found = page(folders.evaluation(tmp_path / "OUT", rtt=folders.curves().to_dict(), lm_eval=None, missing=[]))
    assert "90.0 ± 1.0 % → 30.0 ± 1.0 % → 28.0 ± 1.0 %" in found.text and "12.35" in found.text
    assert "the strongest attack of kunbr-fast evaluate" in found.text
    assert "Settings that are not the defaults" not in found.text and "Losses by stage" not in headings(found)


def test_probabilities_are_called_so(tmp_path):
    found = page(folders.run(tmp_path / "OUT", folders.report("probability")))
    assert "forget, answer probability" in found.text and "of the questions answered" not in found.text
    assert "Mean probability of the right answer" in found.text and "95.0 ± 1.1 %" in found.text
    assert "guessing" not in found.text


def test_settings_that_differ_from_the_defaults(tmp_path):
    found = page(folders.run(tmp_path / "OUT", folders.report(block_lr=3e-4)))
    assert "block_lr learning rate of the block 0.0003 2e-07" in found.text
    assert "warmup_lr" not in re.split(r"All \d+ settings", found.text)[0]


# ---------------------------------------------------------------- text is text


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_text_becomes_markup(text, tmp_path):
    """Wherever text from outside stands, also as a key."""
    made = folders.report()
    made.losses[text] = [{"forget_loss": 1.0, "retain_loss": 1.0}]
    made.seconds[text] = 1.0
    out = folders.run(tmp_path / "OUT", made, text, examples=folders.examples([text] * 5), cautions=[text])
    folders.evaluation(
        out,
        figures=[folders.row(text, text, text, text, 0.5, title=text, unit=text, known=text, detail={text: text})],
        missing=[{"measure": text, "why": text}],
        models={text: {"path": text, "fingerprint": text}},
        sets={text: {"records": 1, "files": [text], "forms": {text: 1}, "fingerprint": text}},
        settings={text: text},
        lm_eval={text: {"metric": text}},
    )
    write_sealed(out / "unlearning.json", {text: {"sha256": "9" * 64}})
    found = page(out, title=text)
    shown = " ".join(markup.visible(text).replace("\xa0", " ").split())
    assert found.text.count(shown) >= 15
    page(out, folders.run(tmp_path / "B"), title=text)


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\0b", "a\\x00b"),
        ("\u202eabc", "\\u202eabc"),
        ("\x1b[1m", "\\x1b[1m"),
        ("two\nlines", "two\nlines"),
        ("a\u200db", "a\u200db"),
        ("\u2066x\u2069", "\\u2066x\\u2069"),
        ("é 漢", "é 漢"),
        ("\ud800", "\\ud800"),
        ("a\u3000b", "a\u3000b"),
    ],
)
def test_what_a_reader_would_not_see_is_visible(text, shown):
    assert markup.visible(text) == shown


def test_a_long_text_is_cut_in_its_middle():
    assert markup.visible("a" * 5000 + "z") == f"{'a' * 2000} [...] {'a' * 1999}z"


# ---------------------------------------------------------------- the file


def test_the_same_folder_gives_the_same_bytes(whole, monkeypatch):
    made = []
    for name in ("one.html", "two.html"):
        write_page([whole], whole.parent / name)
        made.append((whole.parent / name).read_bytes())
        monkeypatch.chdir(whole)
    write_page(["."], "three.html")
    assert made[0] == made[1] == (whole / "three.html").read_bytes()
    assert is_page(whole / "three.html")


def test_the_command(whole, capsys):
    assert main(["report", str(whole)]) == 0
    assert capsys.readouterr().out == f"the report is in {whole}/report.html\n"
    first = (whole / "report.html").read_bytes()
    assert main(["report", str(whole), "--json"]) == 0  # its own page is replaced
    assert json.loads(capsys.readouterr().out) == {"file": f"{whole}/report.html"}
    assert (whole / "report.html").read_bytes() == first
    assert {path.name for path in whole.iterdir()} == {
        "report.html",
        "report.json",
        "run.yaml",
        "evaluation.json",
        "unlearning.json",
        "logs",
    }


def test_a_page_that_is_not_ours_stays(whole, capsys):
    (whole / "report.html").write_text("<html>mine</html>")
    assert main(["report", str(whole)]) == 2
    assert "exists and is not a report of kunbr-fast" in capsys.readouterr().err
    assert (whole / "report.html").read_text() == "<html>mine</html>"


def test_several_need_a_place(whole, tmp_path, capsys):
    other = folders.run(tmp_path / "B")
    assert main(["report", str(whole), str(other)]) == 2
    assert "--out FILE.html" in capsys.readouterr().err
    assert main(["report", str(whole), str(other), "--out", str(tmp_path / "both.html"), "--title", "Both"]) == 0
    assert "<h1>Both</h1>" in (tmp_path / "both.html").read_text()


@pytest.mark.parametrize(
    "harm, said",
    [
        (lambda out: [path.unlink() for path in out.glob("*.json")], "OUT: neither report.json nor evaluation.json"),
        (
            lambda out: _change(out / "report.json", '"recovery": 0.275', '"recovery": 0.1'),
            "report.json: damaged or edited",
        ),
        (lambda out: _change(out / "evaluation.json", '"number": 80', '"number": 81'), "evaluation.json: damaged"),
        (lambda out: (out / "report.json").write_text("{}"), "report.json: not the report of a run"),
        (lambda out: (out / "report.json").write_text("{"), "report.json: not JSON"),
        (lambda out: (out / "unlearning.json").write_text("[]"), "unlearning.json: damaged"),
        (lambda out: _change(out / "logs" / "log.csv", "step,stage", "step,stages"), "log.csv: not a log"),
        (
            lambda out: _change(out / "logs" / "log.csv", "\n2,warmup,1002,1.0", "\n2,warmup,1002,x"),
            "log.csv:3: loss: got 'x'",
        ),
        (lambda out: folders.evaluation(out, format=2), "evaluation.json: format 2"),
        (
            lambda out: folders.evaluation(out, figures=[{"measure": "x"}]),
            "evaluation.json: not of kunbr-fast evaluate",
        ),
        (lambda out: folders.run(out, blocks=[[0, 99]]), "report.json: blocks: got [0, 99]"),
        (
            lambda out: folders.run(out, accuracy={"result": {"forget": {"plain": "x"}}}),
            "accuracy.result.forget.plain: got 'x', expected a number",
        ),
    ],
)
def test_what_is_damaged_is_named(harm, said, whole, capsys):
    harm(whole)
    assert main(["report", str(whole)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (whole / "report.html").exists()


def _change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_no_such_folder(tmp_path, capsys):
    assert main(["report", str(tmp_path / "none"), "--out", str(tmp_path / "a.html")]) == 2
    assert "none: no such folder" in capsys.readouterr().err


def test_settings_that_were_edited_are_said(whole):
    assert "edited" not in page(whole).text
    (whole / "run.yaml").write_text("top_k: 3\n")
    assert "run.yaml is not what the run wrote" in page(whole).text


def test_a_log_that_was_cut(whole):
    with open(whole / "logs" / "log.csv", "a") as file:
        file.write("13,blocks")
    assert read(whole).steps["step"][-1] == 12


# ---------------------------------------------------------------- several


def test_several_side_by_side(tmp_path):
    first = folders.run(tmp_path / "A", folders.report(block_lr=1e-4))
    second = folders.run(tmp_path / "B", folders.report(block_lr=2e-4))
    found = page(first, folders.evaluation(second))
    assert "Settings that differ setting A B block_lr 0.0001 0.0002" in found.text
    differing = [value for tag, name, value in found.attributes if (tag, name) == ("tr", "class")]
    assert differing == ["differs"] * 2  # alone, and among all
    assert "forget, accuracy: result 27.5 ± 5.0 % 27.5 ± 5.0 %" in found.text
    assert "were measured differently" not in found.text and "2 runs were chosen" in found.text


def test_accuracies_and_probabilities_are_not_mixed(tmp_path):
    first = folders.run(tmp_path / "A")
    found = page(first, folders.run(tmp_path / "B", folders.report("probability")))
    assert "These runs were measured differently (accuracy: A; probability: B)" in found.text
    assert "forget, accuracy: result 27.5 ± 5.0 % –" in found.text
    assert "forget, answer probability: result – 27.5 ± 1.1 %" in found.text
    assert "Forgotten (accuracy) 95.0 ± 2.4 % → 27.5 ± 5.0 % – " in found.text
    titles = [text for text in found.texts if text == "What comes back: the strongest attack of each run"]
    assert len(titles) == 2


def test_runs_of_one_name_and_of_another_model(tmp_path):
    first = folders.run(tmp_path / "1" / "OUT")
    second = folders.run(tmp_path / "2" / "OUT", sealed=False)
    found = page(first, second)
    assert "OUT (2)" in found.text and "It is not known whether OUT (2) began with the same model" in found.text


# ---------------------------------------------------------------- charts


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.13, 0.38, [0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4]),
        (-3, 4, [-4, -2, 0, 2, 4]),
        (5, 5, None),
        (-2e-16, 1e-16, [-2e-16, -1e-16, 0, 1e-16]),
    ],
)
def test_ticks(low, high, expected):
    found = charts.ticks(low, high, 5)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 8
    assert expected is None or found == pytest.approx(expected, abs=1e-30)
    assert found == sorted(set(found))


def test_a_line_is_where_its_values_are_and_broken_where_one_is_missing():
    html = charts.lines(Chart("t", "x", "y"), [Series("one", [0, 1, 2, 3, 4], [0, 10, None, 5, 10])])
    (narrow, *_) = re.findall(r'<svg[^>]*class="narrow".*?</svg>', html)
    paths = re.findall(r'<path d="M([^"]*)" class="line"', narrow)
    places = [[tuple(map(float, point.split())) for point in path.split("L")] for path in paths]
    width, height = charts.SIZES["narrow"]
    bottom, top = height - charts.BOTTOM, charts.TOP
    assert [[round(y, 1) for _, y in path] for path in places] == [[bottom, top], [(bottom + top) / 2, top]]
    inside = width - charts.LEFT - charts.RIGHT
    assert places[1][0][0] == pytest.approx(
        charts.LEFT + inside * (3 + 0.08) / 4.16, abs=0.06
    )  # 2 % of room at each end


def test_bars_begin_at_zero_also_below_it():
    html = charts.bars(Chart("t", "x", "y"), ["a", "b"], [Bars("one", [4.0, -2.0])])
    (narrow, *_) = re.findall(r'<svg[^>]*class="narrow".*?</svg>', html)
    boxes = [
        tuple(map(float, found))
        for found in re.findall(r'<rect x="([^"]*)" y="([^"]*)" width="([^"]*)" height="([^"]*)" class="fill"', narrow)
    ]
    (_, top, _, height), (_, zero, _, below) = boxes
    assert top + height == pytest.approx(zero, abs=0.11) and height == pytest.approx(2 * below, abs=0.21)


def test_looks_are_apart_without_colours():
    """Twelve series: no two have the same dashes and marker and colour, and no six neighbours the same dashes."""
    looks = [(look % len(COLOURS), charts._dashes(look), charts._marker(look, 0, 0)) for look in range(12)]
    assert len(set(looks)) == 12 and all(len({dash for _, dash, _ in looks[i : i + 6]}) == 6 for i in (0, 6))


def test_a_chart_has_its_figures_as_a_table_and_says_what_it_shows():
    html = charts.lines(
        Chart("Title", "steps", "loss", precision=".2f"), [Series("one", [1, 2], [0.5, 0.25], [0.1, None])]
    )
    found = Page(html)
    assert "Title one" in found.text and "steps one 1 0.50 ± 0.10 2 0.25" in found.text
    labels = [value for tag, name, value in found.attributes if (tag, name) == ("svg", "aria-label")]
    assert labels == ["Title: loss, by steps. The figures are in the table below."] * 2
    assert charts.lines(Chart("t", "x", "y"), [Series("none", [1], [None])]) == ""


@pytest.mark.parametrize(
    "value, error, unit, text",
    [
        (0.5, None, "share", "50.0 %"),
        (0.123, 0.0456, "share", "12.3 ± 4.6 %"),
        (-0.04, None, "points", "0.0 points"),
        (3.14159, 0.0123, "", "3.142 ± 0.012"),
        (39861.4, 472.0, "", "39860 ± 470"),
        (0.00061, 0.000082, "share", "0.061 ± 0.008 %"),
        (None, None, "share", "–"),
    ],
)
def test_figures(value, error, unit, text):
    assert markup.figure(value, error, unit).replace("\xa0", " ") == text


@pytest.mark.parametrize(
    "value, error, unit, text",
    [
        (0.1, 0.02, "share", "+10.0 ± 2.0 points"),
        (-0.1, None, "share", "−10.0 points"),
        (1e-5, None, "share", "0.0 points"),
        (-1e-5, None, "share", "0.0 points"),
        (2.5, 0.25, "", "+2.5 ± 0.25"),
    ],
)
def test_changes(value, error, unit, text):
    assert markup.change(value, error, unit).replace("\xa0", " ") == text


def test_evaluations_of_other_records_or_settings_are_not_compared_in_silence(tmp_path):
    def warned(**more):
        first = folders.evaluation(tmp_path / "A")
        return page(first, folders.evaluation(tmp_path / "B", **more)).text

    of_set = {"records": 80, "fingerprint": "e" * 32}
    assert "The evaluations have different" not in warned(sets={"forget": of_set})
    text = warned(sets={"forget": {**of_set, "fingerprint": "d" * 32}, "retain": of_set})
    assert "The evaluations have different forget records" in text and "different retain" not in text
    assert "different settings (max_new_tokens)" in warned(settings={"max_new_tokens": 32, "device": "cuda"})
