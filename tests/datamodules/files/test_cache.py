import fcntl
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from malleable.datamodules.files import cache as module
from malleable.datamodules.files.cache import hash_settings, open_arrays, open_tables, write_arrays, write_tables

TABLES = {
    "items": {"id": pa.array([1, 2, 3]), "tokens": pa.array([[1], [], [2, 3]], pa.list_(pa.int32()))},
    "empty": {"id": pa.array([], pa.int64())},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tables(tmp_path / "tables", TABLES, {"name": "x"})
    return tmp_path / "tables"


def test_tables_are_memory_mapped(folder):
    before = pa.total_allocated_bytes()
    tables, meta = open_tables(folder)
    assert pa.total_allocated_bytes() - before < 1000
    assert tables["items"].to_pydict() == {"id": [1, 2, 3], "tokens": [[1], [], [2, 3]]}
    assert "empty" not in tables
    assert meta == {"name": "x"}


def test_missing_cache_gives_no_warning(tmp_path, caplog):
    assert open_tables(tmp_path / "tables") is None
    assert not caplog.records


def test_changed_byte_is_detected(folder, caplog):
    path = next((folder / "items").glob("*.arrow"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert open_tables(folder) is None
    assert f"is corrupt (items/{path.name}): building it again" in caplog.text


@pytest.mark.parametrize("lost", ["manifest.json", "items/state.json"])
def test_missing_file_is_detected(folder, caplog, lost):
    (folder / lost).unlink()
    assert open_tables(folder) is None
    assert "building it again" in caplog.text


def test_truncated_manifest_is_detected(folder, caplog):
    (folder / "manifest.json").write_text('{"files"')
    assert open_tables(folder) is None
    assert "is incomplete" in caplog.text


def test_writing_replaces_a_damaged_cache(folder):
    shutil.rmtree(folder / "items")
    write_tables(folder, TABLES, {})
    assert open_tables(folder) is not None
    assert [path.name for path in folder.parent.iterdir() if "tmp" in path.name] == []


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module, "seal", fail)
    with pytest.raises(OSError, match="disk full"):
        write_tables(tmp_path / "tables", TABLES, {})
    assert list(tmp_path.glob("tables*")) == []


def test_first_of_two_writers_is_kept(folder):
    stamp = (folder / "manifest.json").stat().st_mtime_ns
    write_tables(folder, TABLES, {"name": "second"})
    assert (folder / "manifest.json").stat().st_mtime_ns == stamp
    assert [path.name for path in folder.parent.iterdir() if "tmp" in path.name] == []


def test_late_writer_keeps_the_existing_cache(tmp_path):
    def overtaken(part: Path) -> None:
        write_arrays(tmp_path / "arrays", {"heads": np.arange(3)}, {"by": "another"})
        np.save(part / "heads.npy", np.arange(3))

    module._write(tmp_path / "arrays", overtaken, {"arrays": ["heads"], "meta": {"by": "this"}})
    assert open_arrays(tmp_path / "arrays")[1] == {"by": "another"}
    assert [path.name for path in tmp_path.iterdir()] == ["arrays"]


def test_temporary_folder_of_a_killed_process_is_removed(folder):
    left = folder.with_name(f".{folder.name}.xyz.tmp")
    (left / folder.name).mkdir(parents=True)
    assert open_tables(folder) is not None
    assert list(folder.parent.iterdir()) == [folder]


def test_temporary_folder_in_use_is_not_removed(folder):
    used = folder.with_name(f".{folder.name}.xyz.tmp")
    used.mkdir()
    # A lock belongs to a descriptor, so this one has the effect of a lock of another process.
    descriptor = os.open(used, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert open_tables(folder) is not None
        assert used.is_dir()
    finally:
        os.close(descriptor)


def test_hash_does_not_depend_on_order():
    assert hash_settings({"a": 1, "b": [2]}) == hash_settings({"b": [2], "a": 1})
    assert hash_settings({"a": 1}) != hash_settings({"a": 2})


def test_arrays_are_memory_mapped(tmp_path):
    arrays = {"heads": np.arange(5, dtype=np.int32), "empty": np.zeros((0, 3), dtype=np.int64)}
    write_arrays(tmp_path / "arrays", arrays, {"labels": ["ä", "b"]})
    opened, meta = open_arrays(tmp_path / "arrays")
    assert {name: (array.tolist(), array.dtype) for name, array in opened.items()} == {name: (a.tolist(), a.dtype) for name, a in arrays.items()}
    assert isinstance(opened["heads"], np.memmap)
    assert not opened["heads"].flags.writeable
    assert meta == {"labels": ["ä", "b"]}


def test_changed_byte_of_an_array_is_detected(tmp_path, caplog):
    write_arrays(tmp_path / "arrays", {"heads": np.arange(5)}, {})
    path = tmp_path / "arrays" / "heads.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert open_arrays(tmp_path / "arrays") is None
    assert "is corrupt (heads.npy): building it again" in caplog.text


def test_object_arrays_are_refused(tmp_path):
    with pytest.raises(ValueError, match="pickle"):
        write_arrays(tmp_path / "arrays", {"labels": np.array(["a", None], dtype=object)}, {})
    assert list(tmp_path.iterdir()) == []
