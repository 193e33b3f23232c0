"""The demo over several seeds: a table of means, and rows for benchmarks/results.

for s in 1 2 3; do kunbr-fast demo --seed $s --out runs/demo-$s; done
python benchmarks/scripts/demo_seeds.py runs/demo-*/report.json --csv benchmarks/results/demo_cpu.csv
"""

import statistics
from pathlib import Path

from kunbr_fast.benchmarks.measure import add_rows, script_parser
from kunbr_fast.files.documents import read_json
from kunbr_fast.run.demo import UNREHEARSED


def main():
    parser = script_parser(__doc__)
    parser.add_argument("reports", nargs="+", type=Path, help="report.json of demo runs")
    arguments = parser.parse_args()
    rows = []
    for report in map(read_json, arguments.reports):
        for row in report["rows"]:
            values = {"forget": row["forget"], "retain": row["retain"], **row["other"], "rtt": row.get("rtt")}
            found = report["rtt"].get(row["method"], {})
            values["smooth"] = found.get("smooth_accuracy")
            of = {attack: summary["accuracy"] for attack, summary in found.get("attacks", {}).items()}
            values |= {attack: of.get(attack) for attack in ("full", *UNREHEARSED)}
            values = {name: None if value is None else round(100 * value, 1) for name, value in values.items()}
            seconds = {f"{name.lower()}_s": round(value, 1) for name, value in row["seconds"].items()}
            rows.append({"benchmark": "demo", "seed": report["seed"], "method": row["method"], **values,
                         **{"training_s": None, "rtt_s": None, **seconds}})  # fmt: skip
    print(
        "| method | forget | retain | bystanders | RTT | RTT of each seed |\n| --- | ---: | ---: | ---: | ---: | --- |"
    )
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        mean = {k: statistics.mean(r[k] for r in mine) for k in ("forget", "retain", "bystanders")}
        rtt = [r["rtt"] for r in mine if r["rtt"] is not None]
        cells = [f"{value:.1f}" for value in mean.values()]
        cells += [f"{statistics.mean(rtt):.1f}", ", ".join(f"{v:.1f}" for v in rtt)] if rtt else ["-", "-"]
        print(f"| {method} | {' | '.join(cells)} |")
    add_rows(arguments.csv, rows)


if __name__ == "__main__":
    main()
