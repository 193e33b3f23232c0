"""Measured rows in benchmarks/results/*.csv: each with the machine, the versions, the commit and the command."""

import csv
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent


def cpu_name():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def commit():
    out = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return out.stdout.strip() or "unknown"


def about():
    script = os.path.relpath(sys.argv[0], ROOT)
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "command": " ".join(["python", script, *sys.argv[1:]]),
    }


def add_rows(path, rows):
    """Appends `rows` (mappings of one shape) to the CSV at `path`, each with `about()`; a new file gets a header."""
    path, more = Path(path), about()
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *more])
        if new:
            writer.writeheader()
        writer.writerows({**row, **more} for row in rows)
    print(f"{len(rows)} rows added to {path}")
