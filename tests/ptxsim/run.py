"""Project tests on compiled kernels, in a process of their own:

PYTHONPATH=tests python -m ptxsim.run 90 tests/kernels/test_norms.py -k NAME     (what follows 80 or 90 goes to pytest)
"""

import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile

TESTS = pathlib.Path(__file__).resolve().parent.parent
MEMORY = 12 << 30  # bytes of addresses: a runaway test fails, and the machine lives


def command(architecture, arguments, folder):
    """(arguments, environment) of a pytest that compiles for sm_`architecture`, with Triton's cache in `folder`."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    environment |= {"PTXSIM_ARCHITECTURE": str(architecture), "PTXSIM_REPORT": str(pathlib.Path(folder, "report.json"))}
    options = ["-p", "ptxsim.plugin", "-p", "no:cacheprovider", "-W", "ignore", "-q"]
    return [sys.executable, "-m", "pytest", *options, *arguments], environment


def limit_memory():
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def run(architecture, arguments, folder, seconds):
    """(what it printed, its report). AssertionError where a test fails, or none is run; TimeoutExpired."""
    line, environment = command(architecture, arguments, folder)
    done = subprocess.run(
        line,
        env=environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=seconds,
        preexec_fn=limit_memory,
    )
    assert done.returncode == 0, f"sm_{architecture}\n{done.stdout[-8000:]}{done.stderr[-2000:]}"
    return done.stdout, json.loads(pathlib.Path(environment["PTXSIM_REPORT"]).read_text())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        line, environment = command(sys.argv[1], sys.argv[2:], scratch)
        sys.exit(subprocess.run(line, env=environment, preexec_fn=limit_memory).returncode)
