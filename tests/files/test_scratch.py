"""Scratch folders: gone at the end, gone with the next one after a kill, and never another's."""

import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
from safetensors.torch import save_file

from kunbr_fast.files import atomic
from kunbr_fast.files.scratch import MARKER, remove_leftovers, scratch

KILLED = """
import os, signal, sys
from kunbr_fast.files import atomic, scratch
calls, kill_at = 0, int(sys.argv[2])
def hooked(owner, name):
    real = getattr(owner, name)
    def wrapped(*args, **kwargs):
        global calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(owner, name, wrapped)
for name in ("mkdir", "open", "unlink", "rmdir", "replace", "fsync", "chmod", "close"):
    hooked(os, name)
atomic.write_json(sys.argv[1], {"new": True})
print(calls)
"""


def killed(path, at):
    return subprocess.run([sys.executable, "-c", KILLED, str(path), str(at)], capture_output=True, text=True)


def test_what_a_killed_write_left_goes_with_the_next_one_to_the_same_target(tmp_path):
    """At every call that changes a file: the old file or the new one, and nothing beside it after the next write."""
    path = tmp_path / "x.json"
    whole = killed(path, 0)
    assert whole.returncode == 0, whole.stderr
    calls, left = int(whole.stdout), 0
    assert calls > 8
    for at in range(1, calls + 1):
        path.write_text("old")
        assert killed(path, at).returncode == -signal.SIGKILL
        assert path.read_text() in ("old", '{\n  "new": true\n}\n')
        left += len(os.listdir(tmp_path)) > 1
        atomic.write_json(tmp_path / "y.json", {})  # another target: nobody's business
        (tmp_path / "y.json").unlink()
        atomic.write_json(path, {})
        assert os.listdir(tmp_path) == ["x.json"], at
    assert left >= 5


def test_what_a_library_put_beside_its_file_goes_too(tmp_path):
    """safetensors writes to a file of its own and renames it."""
    program = (
        "import os, signal, sys; from pathlib import Path; from kunbr_fast.files import atomic\n"
        "def writer(path):\n"
        "    (path.parent / '.tmpAb12Cd').write_bytes(b'half')\n"
        "    (path.parent / 'folder').mkdir()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "atomic.write_with(sys.argv[1], writer)"
    )
    path = tmp_path / "x.safetensors"
    assert subprocess.run([sys.executable, "-c", program, str(path)]).returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 1
    atomic.write_with(path, lambda temporary: save_file({}, temporary))
    assert os.listdir(tmp_path) == ["x.safetensors"]


def _hold(directory, ready, end):
    with scratch("kunbr-x-", directory) as folder:
        (folder / "copy").write_bytes(b"weights")
        ready.set()
        end.wait(60)


def test_a_living_process_keeps_its_folder_and_a_killed_one_does_not(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, end = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, ready, end))
    other.start()
    assert ready.wait(60)
    (theirs,) = tmp_path.iterdir()
    with scratch("kunbr-x-", tmp_path) as mine:
        assert {*tmp_path.iterdir()} == {theirs, mine} and (theirs / "copy").is_file()
        with scratch("kunbr-x-", tmp_path) as second:  # of this process too
            assert mine.is_dir() and second != mine
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    assert theirs.is_dir()
    with scratch("kunbr-x-", tmp_path) as mine:
        assert [*tmp_path.iterdir()] == [mine]
    assert [*tmp_path.iterdir()] == []


HEX = "0123456789ab"


@pytest.mark.parametrize(
    "name", [f"kunbr-x-{HEX}", f"kunbr-x-{HEX}.bak", "kunbr-x-notes", f"my-kunbr-x-{HEX}", f".x.json.{HEX}.tmp"]
)
def test_what_only_looks_like_ours_stays(tmp_path, name):
    """A folder with another form of name, or without our marker, or a file, or a link to a folder of ours."""
    for number, make in enumerate(("folder", "file", "link", "marked")):
        here = tmp_path / str(number)
        here.mkdir()
        if make == "file":
            (here / name).write_bytes(b"mine")
        elif make == "link":
            (here / "other").mkdir()
            (here / "other" / MARKER).touch()
            (here / name).symlink_to("other")
        elif make == "folder" or name not in (f"kunbr-x-{HEX}", f".x.json.{HEX}.tmp"):
            (here / name).mkdir()
            (here / name / ("thesis" if make == "folder" else MARKER)).write_bytes(b"mine")
        before = sorted(str(path) for path in here.rglob("*"))
        with scratch("kunbr-x-", here):
            pass
        remove_leftovers(here)
        assert sorted(str(path) for path in here.rglob("*")) == before, make


def test_all_leftovers_of_writes_in_a_folder(tmp_path):
    for name in (f".a.json.{HEX}.tmp", f".b c.safetensors.{HEX}.tmp", f".x.{HEX}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MARKER).touch()
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == [f".x.{HEX}"]
    remove_leftovers(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_no_file_takes_the_place_of_a_device_or_a_pipe(kind, tmp_path):
    path = tmp_path / "x"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        try:
            os.mknod(path, 0o20666, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("only root makes devices")
    with pytest.raises(OSError, match="could not write .*x: it is a device, a pipe or a socket"):
        atomic.write_json(path, {})
    assert not path.is_file() and os.listdir(tmp_path) == ["x"]


def test_a_full_disk_says_how_much_was_needed(tmp_path):
    with pytest.raises(OSError, match=r"left on device \(2.50 GiB needed, [\d.]+ [MG]iB free\); the file before"):
        with atomic.atomic_path(tmp_path / "x", int(2.5 * 2**30)):
            raise OSError(28, "No space left on device")
