"""Files that are the old ones or the new ones, never half of one."""

import errno
import hashlib
import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from kunbr_fast.files import atomic


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "report.json"
    path.write_bytes(b"old")
    return path


def only(path):
    """`path` is the only file in its directory, so no temporary one is left."""
    return os.listdir(path.parent) == [path.name]


def test_success_replaces(old):
    with atomic.atomic_write(old) as file:
        file.write(b"new")
        file.flush()
        assert old.read_bytes() == b"old"  # until the block ends
    assert old.read_bytes() == b"new" and only(old)


def test_directories_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "c.bin"
    with atomic.atomic_write(str(path)) as file:
        file.write(b"x")
    assert path.read_bytes() == b"x" and only(path)


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
def test_an_exception_leaves_the_old_file(old, error):
    with pytest.raises(type(error)):
        with atomic.atomic_write(old) as file:
            file.write(b"half of the n")
            raise error
    assert old.read_bytes() == b"old" and only(old)


def test_a_failing_writer_leaves_nothing(tmp_path):
    def writer(path):
        path.write_bytes(b"half")
        raise RuntimeError("writer failed")

    with pytest.raises(RuntimeError, match="writer failed"):
        atomic.write_with(tmp_path / "new.bin", writer)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_says_which_file(old, monkeypatch):
    with pytest.raises(OSError) as error:
        with atomic.atomic_write(old) as file:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert error.value.errno == errno.ENOSPC
    assert f"could not write {old}: No space left on device" in str(error.value)
    assert old.read_bytes() == b"old" and only(old)

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)  # many file systems report it only here
    with pytest.raises(OSError, match="could not write .*No space left"):
        atomic.write_json(old, {})
    assert old.read_bytes() == b"old" and only(old)


def test_an_oserror_without_a_number_keeps_its_text(old):
    with pytest.raises(OSError, match="the tape is stuck"):
        atomic.write_with(old, lambda path: (_ for _ in ()).throw(OSError("the tape is stuck")))
    assert only(old)


def test_a_target_that_is_a_directory(tmp_path):
    (tmp_path / "dir").mkdir()
    with pytest.raises(OSError, match="could not write"):
        atomic.write_json(tmp_path / "dir", {})
    assert os.listdir(tmp_path) == ["dir"]


def test_json(old):
    value = {"é": [1 / 3, 1e-310, -0.0, True, None, 2**60]}
    atomic.write_json(old, value)
    assert json.loads(old.read_text(encoding="utf-8")) == value and "é" in old.read_text(encoding="utf-8")
    before = old.read_bytes()
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError):
            atomic.write_json(old, {"x": bad})
    with pytest.raises(TypeError):
        atomic.write_json(old, {"x": object()})
    assert old.read_bytes() == before and only(old)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_any_new_file(tmp_path, mask):
    """Also where the library that writes makes the file private (safetensors does), and no wider than the umask."""
    before = os.umask(mask)
    try:
        atomic.write_json(tmp_path / "a.json", {})
        atomic.write_with(tmp_path / "b.safetensors", lambda path: save_file({"x": torch.ones(2)}, path))
    finally:
        os.umask(before)
    for name in ("a.json", "b.safetensors"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~mask, name
    assert torch.equal(load_file(tmp_path / "b.safetensors")["x"], torch.ones(2))


def test_flushed_before_it_is_renamed(old, monkeypatch):
    """After a power cut the name must not lead to an empty file: data, then name, then directory."""
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda h: (done.append("d" if stat.S_ISDIR(os.fstat(h).st_mode) else "f"), fsync(h))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("r"), replace(a, b)))
    atomic.write_json(old, {})
    assert done == ["f", "r", "d"]


def test_sha256(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(os.urandom((1 << 20) + 17))
    truth = hashlib.sha256(path.read_bytes()).hexdigest()
    assert atomic.sha256(path) == truth
    monkeypatch.delattr(hashlib, "file_digest", raising=False)  # Python 3.10
    assert atomic.sha256(path) == truth
