"""The page's style sheet: light and dark, from 320 pixels on, and on paper. Text is never below 11 pixels."""

from kunbr_fast.evaluation.figures import COLOURS

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --soft: #57606a; --line: #d4d9df; --back: #ffffff; --shade: #f4f6f8;
  --good: #00664a; --warn: #9a3412; --warnback: #fff4ec; --link: #0a5a94; --first: #A9C6DC; SERIES }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --soft: #a4adb7; --line: #3a4149; --back: #14171a;
  --shade: #1e2328; --good: #4fd1a5; --warn: #ffab7a; --warnback: #2c1f17; --link: #7cc0ee; --first: #5b7f99; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif; color: var(--text);
  background: var(--back); max-width: 62rem; margin: 0 auto; padding: 1rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: .6rem 0 .2rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
p { margin: .5rem 0; max-width: 46rem; } ul { margin: .4rem 0; padding-left: 1.3rem; } li { margin: .25rem 0;
  max-width: 46rem; }
a { color: var(--link); }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .88em; }
.soft { color: var(--soft); } p.soft { font-size: .92rem; }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem;
  font-size: .9rem; } nav li { margin: 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 13.5rem), 1fr)); gap: .8rem;
  margin: 1rem 0; }
.card { background: var(--shade); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; }
.card h3 { margin: 0; font-size: .95rem; color: var(--soft); } .card p { margin: .3rem 0 0; font-size: .92rem; }
.card .big { font-size: 1.32rem; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums; }
.caution { background: var(--warnback); border-left: 4px solid var(--warn); padding: .5rem .9rem; margin: .8rem 0;
  border-radius: 0 6px 6px 0; } .caution p { margin: 0; }
/* A shade at an end of a table that goes on there. */
.wide { overflow-x: auto; max-width: 100%; margin: .6rem 0; background:
  linear-gradient(90deg, var(--back) 40%, transparent) left / 2rem 100% no-repeat local,
  linear-gradient(270deg, var(--back) 40%, transparent) right / 2rem 100% no-repeat local,
  linear-gradient(90deg, var(--line), transparent) left / .7rem 100% no-repeat scroll,
  linear-gradient(270deg, var(--line), transparent) right / .7rem 100% no-repeat scroll; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding: .2rem 0; }
th, td { padding: .28rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap;
  vertical-align: top; overflow-wrap: normal; }
thead th { background: var(--shade); font-weight: 600; } tbody th { font-weight: 400; }
.t { text-align: left; white-space: normal; min-width: 5rem; max-width: 26rem; overflow-wrap: anywhere; }
th.t { min-width: 8rem; max-width: 30rem; }
.differs td, .differs th { background: var(--warnback); } .sum td, .sum th { font-weight: 650; }
.help { display: block; color: var(--soft); font-size: .84rem; min-width: 11rem; } th code { white-space: nowrap; }
.bar { display: inline-block; height: .7em; background: var(--s1); border-radius: 2px; vertical-align: baseline; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) minmax(0, 1fr); gap: .25rem 1rem; margin: .6rem 0;
  font-size: .94rem; }
dt { color: var(--soft); max-width: 14rem; } dd { margin: 0; white-space: pre-wrap; }
.example { border: 1px solid var(--line); border-radius: 8px; padding: .2rem .9rem; margin: .7rem 0; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--link); font-size: .92rem; }
figure { margin: 1rem 0 1.4rem; } figcaption { font-weight: 650; max-width: 46rem; }
figure p { font-size: .9rem; } figure svg { display: block; height: auto; overflow: visible; }
.narrow { width: 100%; max-width: 30rem; } .broad { width: 100%; max-width: 60rem; }
.legend { list-style: none; padding: 0; margin: .4rem 0; display: flex; flex-wrap: wrap; gap: .15rem 1.2rem;
  font-size: .88rem; } .legend li { display: flex; gap: .45rem; align-items: flex-start; min-width: 0; max-width: 100%;
  margin: 0; } .legend svg { flex: none; width: 34px; height: 14px; margin-top: .25em; }
svg text { fill: var(--text); font: 12px system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
svg .axis { stroke: var(--soft); fill: none; } svg .grid { stroke: var(--line); fill: none; }
svg .level { stroke: var(--soft); stroke-dasharray: 6 4; fill: none; stroke-width: 1.4; }
svg .line { fill: none; stroke: var(--c); stroke-width: 2.2; stroke-linejoin: round; } svg .thin { stroke-width: 1.1;
  opacity: .55; }
svg .mark { fill: var(--c); stroke: var(--back); stroke-width: .8; } svg .ring { fill: none; stroke: var(--c);
  stroke-width: 2; } svg .error { stroke: var(--text); fill: none; stroke-width: 1.1; }
svg .fill { fill: var(--c); } svg .hollow { fill: none; stroke: var(--soft); stroke-dasharray: 3 2; }
LOOKS
.first { --c: var(--first); }
@media (max-width: 719.98px) { .broad { display: none; } }
@media (min-width: 720px) { .narrow { display: none; } body { padding: 1.5rem 2rem 5rem; } }
@media (max-width: 479.98px) { dl { grid-template-columns: minmax(0, 1fr); gap: 0; } dd { margin-bottom: .5rem; }
  th.t { max-width: 14rem; } .t { max-width: 11rem; } h1 { font-size: 1.45rem; } }
@media print { :root { color-scheme: light; --text: #000; --soft: #444; --line: #bbb; --back: #fff; --shade: #f4f4f4;
  --warnback: #fff; --link: #000; } body { max-width: none; padding: 0; font-size: 11pt; } nav, details:not([open])
  { display: none; } .wide { overflow: visible; } .card, .example, figure, tr { break-inside: avoid; } h2, h3
  { break-after: avoid; } td, th { white-space: normal; } }
""".replace("SERIES", " ".join(f"--s{i}: {colour};" for i, colour in enumerate(COLOURS))).replace(
    "LOOKS", " ".join(f".s{i} {{ --c: var(--s{i}); }}" for i in range(len(COLOURS)))
)
