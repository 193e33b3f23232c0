"""Two processes never write into one folder: the second one stops at once and says who is there."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers import environment

from kunbr_fast.cli import command as cli
from kunbr_fast.files import lock, merge_folder
from kunbr_fast.files.lock import NAME, Holder, hold, hold_file
from kunbr_fast.run import output


def leave(folder, **changes):
    """A lock file as a killed process leaves it."""
    folder.mkdir(exist_ok=True)
    holder = {**vars(Holder.this()), **changes}
    (folder / NAME).write_text(json.dumps(holder))
    return holder


def gone():
    """The number of a process that has ended."""
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def refused(folder, *words):
    with pytest.raises(ValueError) as found, hold(folder):
        pass
    said = str(found.value)
    assert "\n" not in said and all(word in said for word in ("in use", *words)), said


def test_it_is_there_before_anything_and_gone_at_the_end(tmp_path):
    out = tmp_path / "a" / "b"
    with hold(out):
        assert os.listdir(out) == [NAME]
        found = json.loads((out / NAME).read_text())
        assert found["process"] == os.getpid() and found["start"] == lock._start(os.getpid()) > 0
    assert os.listdir(tmp_path) == []  # as it was
    out.mkdir(parents=True)
    (out / "mine").write_text("mine")
    with pytest.raises(KeyboardInterrupt), hold(out):
        raise KeyboardInterrupt
    assert os.listdir(out) == ["mine"]
    with hold_file(out / "x.json"):
        assert sorted(os.listdir(out)) == [".x.json.lock", "mine"]
        with hold_file(out / "y.json"), hold(out):  # other ones
            pass
        with pytest.raises(ValueError, match="x.json is in use by process"), hold_file(out / "x.json"):
            pass
    assert os.listdir(out) == ["mine"]


def test_a_file_that_the_folders_holder_writes(tmp_path, capsys):
    """Whoever comes second stops, of a folder and a file in it that a run or a merge would write too."""
    out = tmp_path / "o"
    assert lock.REPORTS == {*output.REPORTS, merge_folder.SUMMARY, merge_folder.PARTIAL, "results.json"}
    for name in ("report.json", "merge.json", "config.json"):
        with hold(out):
            with pytest.raises(ValueError, match=f"{out} is in use by process "), hold_file(out / name):
                pass
            assert os.listdir(out) == [NAME]
        with hold_file(out / name):
            refused(out, f"{out / name} is in use by process {os.getpid()} on ")
            with hold_file(out / "another.json"), hold_file(out / "tokenizer.json"):
                pass
            assert os.listdir(out) == [f".{name}.lock"]
    assert list(tmp_path.iterdir()) == []
    with hold(out):
        for option, name in (("--out", "report.json"), ("--plot", "density.png")):
            command = ["density", "--model", "m", "--forget", "f.jsonl", option, str(out / name)]
            assert cli.main(command) == 2 and f"{out} is in use by process" in capsys.readouterr().err
        with hold_file(out / "density.json"):  # its own name
            pass
    leave(out, process=gone())
    said = []
    with hold_file(out / "report.json", said.append):
        assert os.listdir(out) == [".report.json.lock"]
    assert len(said) == 1 and "has ended" in said[0]


def test_a_lock_file_that_a_power_cut_has_damaged(tmp_path, monkeypatch):
    out, said = tmp_path / "out", []
    with hold(out):
        whole = (out / NAME).read_bytes()
    assert whole.startswith(lock.BEGINS)
    out.mkdir()
    damaged = (whole[:60], whole[:5], whole[:60] + bytes(40), bytes(len(whole)), whole + whole[90:])
    for content in damaged:
        (out / NAME).write_bytes(content)
        with hold(out, said.append):
            assert json.loads((out / NAME).read_text())["process"] == os.getpid()
            (out / NAME).write_bytes(content)
            monkeypatch.setattr(lock, "PATIENCE", 0.01)
            refused(out, "another process")
        assert os.listdir(out) == []
    assert said == [f"{out}: a process was at work here and has ended: its lock is taken over"] * len(damaged)
    for name, value in (("_locks_of_one_machine", lambda handle: True), ("_flock", lambda handle: None)):
        (out / NAME).write_bytes(whole[:60])
        monkeypatch.setattr(lock, name, value)
        refused(out, "another process", f"if that process is gone, delete {out / NAME}")
        assert (out / NAME).read_bytes() == whole[:60]


def test_another_caller_in_this_process_and_another_name_of_the_folder(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "link").symlink_to(out)
    said = []

    def other():
        try:
            with hold(tmp_path / "link"):
                said.append("in")
        except ValueError as error:
            said.append(str(error))

    with hold(out):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        refused(out, str(os.getpid()))  # in the same thread too: a callback that begins the same run
    assert len(said) == 1 and f"link is in use by process {os.getpid()} on " in said[0]
    other()
    assert said[1] == "in"


def test_a_forked_child_holds_nothing_and_releases_nothing(tmp_path):
    with hold(tmp_path / "out"):
        if (child := os.fork()) == 0:
            status = 1
            try:
                refused(tmp_path / "out", str(os.getppid()))
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        read, write = os.pipe()
        if (child := os.fork()) == 0:  # one that outlives the lock
            os.close(write)
            os.read(read, 1)
            os._exit(0)
        os.close(read)
        refused(tmp_path / "out")
    with hold(tmp_path / "out"):
        pass
    os.close(write)
    os.waitpid(child, 0)


STARTED = """
import sys, time
from pathlib import Path
from kunbr_fast.files.lock import hold
out, begin = Path(sys.argv[1]), float(sys.argv[2])
time.sleep(max(0, begin - time.time()))
try:
    with hold(out, print):
        print("in", flush=True)
        sys.stdin.read()
except ValueError as error:
    print(error, flush=True)
"""


def start(out, begin=0.0):
    command = [sys.executable, "-c", STARTED, str(out), str(begin)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())


def test_of_processes_that_start_at_the_same_instant_one_goes_on(tmp_path):
    out = tmp_path / "new" / "out"
    started = [start(out, time.time() + 0.6) for _ in range(6)]
    first = {process.stdout.readline().strip(): process for process in started}
    holder = first.pop("in")
    assert len(first) == 5 or all("in use" in said for said in first)  # equal lines are one
    assert all(f"{out} is in use by process {holder.pid} on " in said for said in first), first
    holder.send_signal(signal.SIGKILL)
    for process in started:
        process.communicate()
    assert os.listdir(out) == [NAME]
    said = []
    with hold(out, said.append):
        assert json.loads((out / NAME).read_text())["process"] == os.getpid()
    assert len(said) == 1 and f"{out}: process {holder.pid} on " in said[0] and "has ended" in said[0]
    assert os.listdir(out) == []


def test_a_number_that_another_process_has_now_is_no_holder(tmp_path, monkeypatch):
    """Where nothing but the file tells."""
    out, said = tmp_path / "out", []
    monkeypatch.setattr(lock, "_flock", lambda handle: None)
    monkeypatch.setattr(lock, "PATIENCE", 0.05)
    with hold(out):
        refused(out, str(os.getpid()), f"delete {out / NAME}")
    assert not out.exists()
    for changes in ({"start": 1}, {"process": gone()}, {"machine": "an earlier start of this machine"}):
        leave(out, **changes)
        with hold(out, said.append):
            assert json.loads((out / NAME).read_text())["process"] == os.getpid()
        assert os.listdir(out) == [] and len(said) == 1 and "has ended" in said[0]
        said.clear()
    for changes in ({"host": "elsewhere", "machine": "another"}, {"pids": "pid:[1]"}, {}):
        leave(out, **changes)
        refused(out, "if that process is gone, delete")
    (out / NAME).write_text("")  # killed before it could say who it is
    refused(out, "another process", "delete")
    os.unlink(out / NAME)
    with hold(out):
        pass
    assert not out.exists() or os.listdir(out) == []


def test_another_machine_counts_where_its_locks_are_not_seen(tmp_path, monkeypatch):
    out, device = tmp_path / "out", os.stat(tmp_path).st_dev
    monkeypatch.setattr(lock, "MOUNTS", tmp_path / "mountinfo")
    for kind, counts in (
        ("fuse.sshfs host:/x rw", True),
        ("nfs4 server:/x rw,vers=4.2,local_lock=none", False),
        ("nfs server:/x rw,vers=3,local_lock=all", True),
        ("ext4 /dev/sda1 rw", False),
    ):
        mount = f"36 35 {os.major(device)}:{os.minor(device)} / /x rw,noatime - {kind}\n"
        (tmp_path / "mountinfo").write_text(mount)
        leave(out, host="elsewhere", machine="another")
        if counts:
            refused(out, "on elsewhere", f"delete {out / NAME}")
        else:
            said = []
            with hold(out, said.append):
                pass
            assert "on elsewhere" in said[0]


def test_what_is_no_lock_file_of_ours_stays(tmp_path):
    out, mine = tmp_path / "out", tmp_path / "mine"
    out.mkdir()
    mine.write_text("mine")
    for make in (
        lambda path: path.write_text("mine"),
        lambda path: path.write_text('{"process": -1}'),
        lambda path: path.symlink_to(mine),
        lambda path: path.mkdir(),
        lambda path: os.mkfifo(path),
    ):
        make(out / NAME)
        about = os.lstat(out / NAME)
        with pytest.raises(ValueError, match=f"{NAME}: it is no lock file of kunbr-fast's: move it away"), hold(out):
            pass
        assert os.path.samestat(os.lstat(out / NAME), about) and mine.read_text() == "mine"
        (out / NAME).rmdir() if (out / NAME).is_dir() else (out / NAME).unlink()
    with pytest.raises(OSError, match="could not write .*Not a directory"), hold(mine / "out"):
        pass


@pytest.mark.parametrize("command, output", [
    ("unlearn --forget f.jsonl --retain r.jsonl --model m --out", "out"), ("unlearn --resume --forget f.jsonl --retain "
     "r.jsonl --model m --out", "out"), ("merge --base m --models n --mode add --out", "out"), ("demo --out", "out"),
    ("rtt --forget a.jsonl b.jsonl --model m --out", "x.json"), ("density --forget f.jsonl --model m --out", "x.json"),
    ("rtt --forget a.jsonl b.jsonl --model m --plot", "x.png"), ("plan --model m --gpu-memory 24GiB --out", "x.yaml"),
])  # fmt: skip
def test_every_command_that_writes(command, output, tmp_path, capsys):
    """Before it reads anything: there is no model m."""
    path = tmp_path / output
    with hold(path) if output == "out" else hold_file(path):
        before = sorted(tmp_path.rglob("*"))
        assert cli.main([*command.split(), str(path)]) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert f"{path} is in use by process {os.getpid()} on " in error and "wait until it has ended" in error
        assert sorted(tmp_path.rglob("*")) == before
    assert list(tmp_path.iterdir()) == []
