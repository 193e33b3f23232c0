"""The tables of docs/architectures.md, made by examining every architecture.

python tests/architectures/table.py            # 8 minutes; writes them into the page
python tests/architectures/table.py gpt_oss    # prints what is found of some
"""

import multiprocessing
import re
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE, README = ROOT / "docs" / "architectures.md", ROOT / "README.md"
HEADINGS = {"exact": "## Exact", "variants": "## Settings", "refused": "## Refused"}


def row(result):
    """A line's cells: name, way, fused parts, what density measures of it; or name and reason."""
    if result.verdict == "NOT BUILT":
        return [result.name, f"transformers alone does not build it: {result.reason[:90]}"]
    if result.verdict != "EXACT":
        reason = re.sub(r"^[A-Z]\w+:? ", "", result.reason).removesuffix(": this architecture is not supported")
        return [result.name, reason]
    less = [call.removeprefix("density of ") for call in result.refused if call.startswith("density of ")]
    return [result.name, result.way, result.fused or "-", f"not {', '.join(less)}" if less else "all"]


def rows():
    """Of the page."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and not line.startswith("| arch")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def measured_with():
    return re.search(r"transformers (\d[\w.]*\w)", PAGE.read_text())[1]


def write(results):
    """Puts the rows below the two header lines of each heading's table, and the numbers into the page's first lines."""
    from architectures.configurations import VARIANTS
    from readme_tables import with_rows

    exact = [result for result in results if result.verdict == "EXACT"]
    parts = {
        "exact": [result for result in exact if result.name not in VARIANTS],
        "variants": [result for result in exact if result.name in VARIANTS],
        "refused": [result for result in results if result.verdict in ("REFUSED", "NOT BUILT")],
    }
    text = PAGE.read_text()
    for part, heading in HEADINGS.items():
        text = with_rows(text, heading, map(row, parts[part]))
    total = sum(result.name not in VARIANTS for result in results)
    import transformers

    numbers = f"{len(parts['exact'])} of {total}"
    text = re.sub(r"transformers \d[\w.]*\w", f"transformers {transformers.__version__}", text, count=1)
    PAGE.write_text(re.sub(r"\*\*\d+ of \d+\*\*", f"**{numbers}**", text))
    README.write_text(re.sub(r"\[\d+ of \d+\]", f"[{numbers}]", README.read_text()))


def main(names):
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    warnings.simplefilter("ignore")
    import conftest  # noqa: F401 (sets the environment before triton is imported)

    conftest.pytest_sessionstart()
    from architectures.checks import examine
    from architectures.configurations import ARCHITECTURES, VARIANTS

    results = []
    with multiprocessing.get_context("fork").Pool() as pool:
        for result in pool.imap(examine, names or [*ARCHITECTURES, *VARIANTS]):
            results.append(result)
            print(f"{result.name:32s} {result.verdict:10s} {' | '.join(row(result)[1:])[:150]}", flush=True)
            print(*(f"    {fault[:300]}\n" for fault in result.faults), sep="", end="", flush=True)
    wrong = [result.name for result in results if result.verdict not in ("EXACT", "REFUSED", "NOT BUILT")]
    if wrong:
        sys.exit(f"neither exact nor refused: {', '.join(wrong)}")
    if not names:
        write(results)


if __name__ == "__main__":
    main(sys.argv[1:])
