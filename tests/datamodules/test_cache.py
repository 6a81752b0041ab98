import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from malleable.datamodules import cache as module
from malleable.datamodules.cache import digest, open_tables, write_tables

TABLES = {
    "items": {"id": pa.array([1, 2, 3]), "tokens": pa.array([[1], [], [2, 3]], pa.list_(pa.int32()))},
    "empty": {"id": pa.array([], pa.int64())},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tables(tmp_path / "tables", TABLES, {"name": "x"})
    return tmp_path / "tables"


def test_tables_come_back_memory_mapped(folder):
    before = pa.total_allocated_bytes()
    tables, meta = open_tables(folder)
    assert pa.total_allocated_bytes() - before < 1000
    assert tables["items"].to_pydict() == {"id": [1, 2, 3], "tokens": [[1], [], [2, 3]]}
    assert "empty" not in tables
    assert meta == {"name": "x"}


def test_nothing_there_is_no_warning(tmp_path, caplog):
    assert open_tables(tmp_path / "tables") is None
    assert not caplog.records


def test_a_changed_byte_is_found(folder, caplog):
    path = next((folder / "items").glob("*.arrow"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert open_tables(folder) is None
    assert f"is corrupt (items/{path.name}): building it again" in caplog.text


@pytest.mark.parametrize("lost", ["manifest.json", "items/state.json"])
def test_a_lost_file_is_found(folder, caplog, lost):
    (folder / lost).unlink()
    assert open_tables(folder) is None
    assert "building it again" in caplog.text


def test_a_cut_manifest_is_found(folder, caplog):
    (folder / "manifest.json").write_text('{"files"')
    assert open_tables(folder) is None
    assert "is not whole" in caplog.text


def test_writing_replaces_what_is_broken_and_leaves_no_part(folder):
    shutil.rmtree(folder / "items")
    write_tables(folder, TABLES, {})
    assert open_tables(folder) is not None
    assert [path.name for path in folder.parent.iterdir() if "part" in path.name] == []


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module, "sha256_of", fail)
    with pytest.raises(OSError, match="disk full"):
        write_tables(tmp_path / "tables", TABLES, {})
    assert list(tmp_path.glob("tables*")) == []


def test_of_two_writers_the_first_wins(folder):
    stamp = (folder / "manifest.json").stat().st_mtime_ns
    write_tables(folder, TABLES, {"name": "second"})
    assert (folder / "manifest.json").stat().st_mtime_ns == stamp
    assert [path.name for path in folder.parent.iterdir() if "part" in path.name] == []


def test_digest_depends_on_values_not_on_order():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
