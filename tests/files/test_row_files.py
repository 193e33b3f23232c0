"""A state in one file for each rank, read by other numbers of ranks."""

import pytest
import torch

from kunbr_fast.files.checksums import checksum
from kunbr_fast.files.row_files import RowFiles, rows_in, rows_of
from kunbr_fast.files.tensors import WeightSnapshot, save_tensors

WHOLE = {name: torch.randn(rows, 3, dtype=torch.float64) for name, rows in {"one": 1, "five": 5, "eight": 8}.items()}


@pytest.fixture
def files(tmp_path):
    """Of three ranks; not all of them have rows of each tensor."""
    made = []
    for rank in range(3):
        parts = {n: x[list(rows_of(len(x), rank, 3))] for n, x in WHOLE.items() if rows_of(len(x), rank, 3)}
        path = tmp_path / f"rank-{rank}.safetensors"
        save_tensors(path, parts | ({"step": torch.tensor(7.0)} if rank == 0 else {}))
        made.append((path, checksum(path)))
    return made


@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_rows_are_those_of_any_number_of_ranks(size, files):
    found, path = RowFiles(files, "start again"), files[0][0].with_name("whole.safetensors")
    save_tensors(path, WHOLE | {"step": torch.tensor(7.0)})
    alone = WeightSnapshot(path)
    assert rows_in(alone, "step", range(2)) == rows_in(found, "step", range(2)) == 7
    assert set(found) == {*WHOLE, "step"} and found["step"] == 7
    for name, x in WHOLE.items():
        assert torch.equal(found[name], x)
        rows = [rows_of(len(x), rank, size) for rank in range(size)]
        assert [len(part) for part in rows if part] == [len(part) for part in x.chunk(size)]  # as FSDP's
        for part in filter(None, rows):
            for tensors in (found, WHOLE, alone):
                assert torch.equal(rows_in(tensors, name, part), x[part.start : part.stop])


def test_what_is_damaged_or_short_is_named(files):
    found = RowFiles(files, "start again")
    with pytest.raises(ValueError, match="rank-0.safetensors: eight has 3 rows, expected 4"):
        WeightSnapshot(files[0][0]).rows("eight", range(2, 4))
    with pytest.raises(ValueError, match="five has 5 rows in the files of all ranks, expected 6: start again"):
        found.rows("five", range(2, 6))
    damaged = bytearray(files[1][0].read_bytes())
    damaged[-1] ^= 1
    files[1][0].write_bytes(damaged)
    assert torch.equal(found.rows("eight", range(3)), WHOLE["eight"][:3])  # of the first file alone
    with pytest.raises(ValueError, match="rank-1.safetensors: damaged .*: start again"):
        found["eight"]
