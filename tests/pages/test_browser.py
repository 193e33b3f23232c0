"""Pages in a real browser, Chromium without a window: nothing is cut, every picture is there, all text can be read."""

import html
import json
import re
import shutil
import subprocess

import folders
import pytest

from kunbr_fast.pages.page import write_page

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
).split()
SCHEMES = {"dark": 0, "light": 1}  # Blink's numbers
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]

# A page in a frame of the width that is tried: a window has a least width. What is in the frame tells its parent.
FRAME = """<!doctype html><html><body style="margin:0"><pre id="found">nothing</pre>
<script>addEventListener("message", event => {{ document.getElementById("found").textContent = event.data; }});</script>
<iframe src="page.html" style="border:0;width:{width}px;height:{height}px;display:block"></iframe></body></html>"""

MEASURE = """<script>addEventListener("load", () => {
  for (const one of document.querySelectorAll("details")) one.open = OPEN;
  const wide = innerWidth, found = {width: wide, dark: matchMedia("(prefers-color-scheme: dark)").matches, bad: [],
    svgs: 0, texts: 0, scrolls: document.documentElement.scrollWidth, ends: document.documentElement.scrollHeight};
  const name = one => one.tagName + "." + (one.getAttribute("class") || "") + " " + one.textContent.trim().slice(0, 40);
  const bad = (why, one) => found.bad.push(why + ": " + name(one));
  const hidden = one => one.getClientRects().length === 0;
  const own = one => [...one.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
  const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => [r, g, b].map(v => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = one => { for (; one; one = one.parentElement) { const c = rgb(getComputedStyle(one).backgroundColor);
    if (c.length === 3 || c[3] > 0) return c; } return found.dark ? [0, 0, 0] : [255, 255, 255]; };
  for (const one of document.body.querySelectorAll("*")) {
    if (hidden(one) || one.tagName === "SCRIPT") continue;
    const box = one.getBoundingClientRect(), style = getComputedStyle(one), svg = one.closest("svg");
    const scrolled = one.parentElement.closest(".wide");
    if (!scrolled && !(svg && svg !== one) && (box.left < -.5 || box.right > wide + .5)) bad("outside the page", one);
    if (!svg && !scrolled && one.scrollWidth > one.clientWidth + 1 && style.overflowX === "hidden") bad("cut", one);
    if (svg === one) { found.svgs += 1; if (!(box.width > 20 && box.height > 8)) bad("a picture without a size", one); }
    if (!own(one)) continue;
    found.texts += 1;
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    if (parseFloat(style.fontSize) * scale < 10) bad("text of " + parseFloat(style.fontSize) * scale + " px", one);
    const a = light(rgb(svg ? style.fill : style.color)), b = light(behind(one));
    const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (contrast < 4.5) bad("contrast of " + contrast.toFixed(2), one);
  }
  for (const figure of document.querySelectorAll("figure")) if (!hidden(figure)) {
    const shown = [...figure.querySelectorAll(":scope > svg")].filter(one => !hidden(one));
    if (shown.length !== 1) bad(shown.length + " drawings", figure);
    for (const svg of shown) { const of = svg.getBoundingClientRect(), labels = [...svg.querySelectorAll("text")];
      const boxes = labels.map(one => one.getBoundingClientRect());
      boxes.forEach((box, i) => {
        if (box.left < of.left - .5 || box.right > of.right + .5 || box.top < of.top - .5
            || box.bottom > of.bottom + .5) bad("a label outside its picture", labels[i]);
        for (let j = 0; j < i; j++) { const other = boxes[j];
          if (box.left < other.right - 1 && other.left < box.right - 1
              && box.top < other.bottom - 3 && other.top < box.bottom - 3)
                bad("a label over " + labels[j].textContent, labels[i]); } }); } }
  parent.postMessage(JSON.stringify(found), "*");
});</script>"""


def chromium(folder, width, height, scheme, *arguments):
    (folder / "frame.html").write_text(FRAME.format(width=width, height=height))
    profile = folder / f"profile-{width}-{scheme}"
    command = [
        CHROMIUM,
        *FLAGS,
        f"--user-data-dir={profile}",
        f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
    ]
    command += [f"--window-size={max(width, 600)},{height + 40}", "--virtual-time-budget=4000", *arguments]
    done = subprocess.run([*command, f"file://{folder}/frame.html"], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


def whole(folder):
    write_page([folders.whole(folder / "OUT")], folder / "out.html")


def hostile(folder):
    """Words without an end, in every place; many layers, attacks that are all there."""
    long, wide = "Donaudampfschifffahrt" * 12, "國" * 200
    made = folders.report(rtt=False)
    made.density, made.blocks = folders.density(30), [range(i, i + 3) for i in range(0, 24, 3)]
    made.rtt = folders.curves(attacks=("full", "wide", "lion", "long", "lora", "other_facts", "int8", "nf4"))
    made.losses[long] = [{"forget_loss": 12345.678, "retain_loss": -0.00001}]
    made.seconds[long] = 123456.0
    out = folders.run(
        folder / ("x" * 120), made, long, examples=folders.examples([long, wide, long, "a b " * 200, "سلام " * 50])
    )
    row = folders.row(long, "knowledge", "forget", "result", 0.5, title=long, detail={long: long})
    folders.evaluation(out, figures=[row], settings={long: long}, missing=[{"measure": long, "why": wide}])
    write_page([out], folder / "out.html", title=long)


def compared(folder):
    first, second = folders.whole(folder / "A"), folders.run(folder / "B" / ("y" * 100), folders.report("probability"))
    third = folders.run(folder / "C", folders.report(block_lr=0.123, rtt_lrs=(1e-5, 2e-5)), "another/model")
    write_page([first, second, third, folders.evaluation(folder / "E")], folder / "out.html")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [320, 400, 720, 1400])
@pytest.mark.parametrize("make", [whole, hostile, compared])
def test_all_of_it_can_be_read(make, width, scheme, tmp_path):
    make(tmp_path)
    text = (tmp_path / "out.html").read_text()
    assert "<script" not in text
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>\n', text)[0]  # no script would run
    for opened in ("false", "true"):
        script = MEASURE.replace("OPEN", opened)
        (tmp_path / "page.html").write_text(text.replace(policy, "").replace("</body>", f"{script}</body>"))
        told = re.search(r'<pre id="found">(.*?)</pre>', chromium(tmp_path, width, 900, scheme, "--dump-dom"), re.S)[1]
        found = json.loads(html.unescape(told))
        assert (found["width"], found["dark"]) == (width, scheme == "dark")
        assert found["bad"] == [] and found["scrolls"] <= width
        assert found["svgs"] >= 4 and found["texts"] > 100


def test_the_measurements_can_fail(tmp_path):
    """A page that is wrong in each of the ways that are looked for."""
    wrong = (
        "<!doctype html><html><body><div style='width:500px'>wide</div><p style='font-size:9px'>small</p>"
        "<p style='color:#999;background:#fff'>pale</p><svg width='0' height='0'></svg>"
        "<figure><svg viewBox='0 0 100 50' style='width:100px;font:12px serif'><text x='-40' y='20'>out of it</text>"
        "<text x='20' y='40'>one</text><text x='22' y='41'>two</text></svg></figure>"
    )
    (tmp_path / "page.html").write_text(f"{wrong}{MEASURE.replace('OPEN', 'true')}</body></html>")
    told = re.search(r'<pre id="found">(.*?)</pre>', chromium(tmp_path, 400, 900, "light", "--dump-dom"), re.S)[1]
    found = json.loads(html.unescape(told))
    for why in (
        "outside the page",
        "text of 9 px",
        "contrast of 2.8",
        "a picture without",
        "a label outside",
        "a label over one",
    ):
        assert any(why in one for one in found["bad"]), (why, found["bad"])
    assert found["scrolls"] > 400


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [400, 1400])
def test_a_picture_of_it_is_not_blank(width, scheme, tmp_path):
    from PIL import Image

    whole(tmp_path)
    shutil.copy(tmp_path / "out.html", tmp_path / "page.html")
    chromium(tmp_path, width, 2500, scheme, f"--screenshot={tmp_path / 'page.png'}")
    with Image.open(tmp_path / "page.png") as picture:
        part = picture.convert("RGB").crop((0, 60, width, 2500))
    colours = dict((colour, number) for number, colour in part.getcolors(2**24))
    back, most = max(colours.items(), key=lambda item: item[1])
    assert (sum(back) < 150) == (scheme == "dark") and len(colours) > 100
    assert 0.02 < 1 - most / (part.width * part.height) < 0.8
