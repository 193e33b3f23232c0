"""`pytest -p ptxsim.plugin`: Triton kernels of the run are compiled and run here, not interpreted. See `run.py`.

Environment: PTXSIM_ARCHITECTURE (80, 90), PTXSIM_REPORT (a file for what ran, as JSON).
"""

import json
import os
import pathlib

# Triton reads this when it is imported and whenever a kernel is defined: it must not see what conftest.py sets
os.environ.pop("TRITON_INTERPRET", None)

import pytest
import triton

triton.knobs.runtime.interpret = False
DRIVER = pytest.StashKey()


def pytest_configure(config):
    """The project's dispatch must see TRITON_INTERPRET, or it would refuse tensors on a CPU."""
    from .driver import Driver

    driver = config.stash[DRIVER] = Driver(int(os.environ["PTXSIM_ARCHITECTURE"]))
    triton.runtime.driver.set_active(driver)

    from kunbr_fast.kernels import launch, tiles

    assert not launch.INTERPRETED.value
    tiles.architecture = lambda device: driver.architecture
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    from .driver import TooLarge

    try:
        return (yield)
    except TooLarge as error:
        pytest.skip(str(error))


def pytest_terminal_summary(terminalreporter, config):
    driver = config.stash[DRIVER]
    report = {"launches": dict(driver.launches), "instructions": driver.instructions}
    pathlib.Path(os.environ["PTXSIM_REPORT"]).write_text(json.dumps(report))
    terminalreporter.write_line(f"executed as PTX of sm_{driver.architecture}: {report}")
