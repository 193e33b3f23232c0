"""How variants are timed, and what a row says of its machine, versions, commit and command."""

import argparse
import csv
import ctypes
import functools
import gc
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from kunbr_fast.checkout import ROOT
from kunbr_fast.machine import cpu_name, usable_cpus
from kunbr_fast.model.flops import flop_counter
from kunbr_fast.version import __version__

FLUSH = 256 << 20  # bytes written between two runs on a GPU: more than any L2 cache


# ---------------------------------------------------------------- time and memory


def spent_flops(run):
    """FLOPs of run(), attention by its plain products."""
    with sdpa_kernel(SDPBackend.MATH), flop_counter() as counter:
        run()
    return counter.get_total_flops()


def percentile(values, share):
    return sorted(values)[min(len(values) - 1, round(share * (len(values) - 1)))]


AT_LEAST = 3  # rounds, whatever they take


def interleaved(variants, device, repeats, seconds):
    """{name: function} -> ({name: milliseconds of each round}, cores that others used meanwhile, None on a GPU).

    In every round each variant runs once, in turn; each has run before. `repeats` rounds, or as many as are done in
    `seconds`, AT_LEAST some. On a CPU rounds are timed in blocks of a quarter of a second, of which all count, so there
    may be more; a block in which other processes used more than `spare_cores()` is left out. After three times
    `seconds` the least disturbed blocks count: better disturbed numbers, which say so, than none. On a GPU: events,
    with the L2 cache overwritten before each run. Writing it eight times takes the GPU about half a millisecond, in
    which the host gets ahead, so that the launch of a single kernel is not part of its time.
    """
    begin = time.perf_counter()
    if torch.device(device).type == "cuda":
        rounds, flush = [], torch.empty(FLUSH, dtype=torch.int8, device=device)
        while len(rounds) < AT_LEAST or (len(rounds) < repeats and time.perf_counter() - begin < seconds):
            rounds.append(_gpu_round(variants, flush))
        return _by_name(rounds), None
    quiet, blocks, shares = [], [], []
    while len(quiet) < repeats:
        passed = time.perf_counter() - begin
        if passed > (seconds if len(quiet) >= AT_LEAST else 3 * seconds) and len(blocks) >= AT_LEAST:
            break
        blocks.append(_block(variants))
        if blocks[-1][1] <= spare_cores():
            quiet += blocks[-1][0]
            shares.append(blocks[-1][1])
    if len(quiet) < AT_LEAST:
        quiet, shares = [], []
        for rounds, share in sorted(blocks, key=lambda block: block[1]):
            quiet += rounds
            shares.append(share)
            if len(quiet) >= AT_LEAST:
                break
    return _by_name(quiet), statistics.mean(shares)


def spare_cores():
    """How many cores others may use before they disturb what is timed here: those that our threads leave, and 0.1.

    A thread that others displace holds up all that wait for it, for as long as a time slice: 4 ms in place of 0.1.
    """
    return max(0, len(usable_cpus()) - torch.get_num_threads()) + 0.1


def _by_name(rounds):
    return {name: [r[name] for r in rounds] for name in rounds[0]}


def _block(variants):
    """([{name: milliseconds}] of rounds in a row, cores that other processes used meanwhile)."""
    begin, others, rounds = time.perf_counter(), others_seconds(), []
    while not rounds or time.perf_counter() - begin < 0.25:
        times = {}
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            times[name] = (time.perf_counter() - start) * 1e3
        rounds.append(times)
    return rounds, max(0.0, others_seconds() - others) / (time.perf_counter() - begin)


def others_seconds():
    """Seconds of processor time that all other processes have used; 0 without Linux' /proc."""
    try:
        fields = Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
    except OSError:
        return 0.0
    user, nice, system, _idle, _wait, irq, soft, steal = (int(f) / os.sysconf("SC_CLK_TCK") for f in fields)
    return user + nice + system + irq + soft + steal - time.process_time()


def _gpu_round(variants, flush):
    events = {}
    for name, run in variants.items():
        events[name] = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for value in range(8):
            flush.fill_(value)
        events[name][0].record()
        run()
        events[name][1].record()
    torch.cuda.synchronize()
    return {name: start.elapsed_time(end) for name, (start, end) in events.items()}


def peak_memory(run, device):
    """Bytes at the peak of one run above what was there before it: of the GPU's memory, or resident in the process.

    None on a CPU without Linux' /proc.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back, so that `before` is what is in use
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = resident("VmRSS")
    except (OSError, AttributeError):
        return None
    run()
    return max(0, resident("VmHWM") - before)


def resident(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def kept_bytes(run, known=()):
    """Bytes that autograd keeps for the backward pass in one run, each storage once; storages of `known` do not count.

    On the meta device too: storages are told apart by what they are, not by where their data is.
    """
    known, found = {tensor.untyped_storage()._cdata for tensor in known}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage  # held, or its place is given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in found.values())


# ---------------------------------------------------------------- rows


def _said(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no such program
        return ""


def commit():
    """KUNBR_COMMIT names the commit where a checkout travels without its history; "" for an installed release."""
    ours = (ROOT / ".git").exists()  # not that of somebody's repository around our installation
    return os.environ.get("KUNBR_COMMIT") or (
        _said("git", "-C", ROOT, "describe", "--always", "--dirty") if ours else ""
    )


@functools.cache
def driver():
    return _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]


PACKAGES = ("torch", "triton", "transformers", "numpy")
RIVALS = ("liger-kernel", "opacus", "cut-cross-entropy", "lion-pytorch")


def version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def about(device="cpu"):
    """The machine, the versions, the commit and the command: the last columns of every row."""
    gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else cpu_name(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if gpu else "",
        "driver": driver() if gpu else "",
        "kunbr-fast": __version__,
        **{name: version(name) for name in PACKAGES},
        "rivals": " ".join(f"{name} {version(name)}" for name in RIVALS if version(name)),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "commit": commit(),
        "command": command(),
    }


def command():
    """What was typed, with paths in the checkout from its root."""
    script = Path(sys.argv[0])
    ours = script.name in ("kunbr-fast", "__main__.py")
    return shlex.join([*(["kunbr-fast"] if ours else ["python", os.path.relpath(script, ROOT)]), *sys.argv[1:]])


def script_parser(description):
    """The parser of a script that is run by hand, with --csv."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", help="append rows here")
    return parser


def add_rows(path, rows, device="cpu"):
    """Appends `rows` (mappings of one shape) to the CSV at `path`, each with `about(device)`; a new file gets a header.

    Without a path nothing. ValueError for a file whose columns are others.
    """
    if path is None:
        return
    path, rows = Path(path), [{**row, **about(device)} for row in rows]
    columns, new = list(rows[0]), not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    if not new:
        with open(path, newline="") as file:
            header = next(csv.reader(file), [])
        if header != columns:
            raise ValueError(f"{path} has the columns {', '.join(header)}, not {', '.join(columns)}: name another file")
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} rows added to {path}")
