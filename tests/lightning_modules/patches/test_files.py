import pytest

from malleable.lightning_modules.patches.files import mirror, recover, replacing


def tree(path):
    return {item.relative_to(path).as_posix(): item.read_text() for item in path.rglob("*") if item.is_file()}


def write(path, text):
    with replacing(path) as building:
        building.mkdir()
        (building / "file").write_text(text)


@pytest.mark.parametrize("name", ["new/file.txt", "file.txt"])
def test_a_file_appears_or_changes_when_it_is_whole(tmp_path, name):
    path = tmp_path / name
    (tmp_path / "file.txt").write_text("old")
    with replacing(path) as building:
        building.write_text("new")
        assert not path.exists() or path.read_text() == "old"
    assert path.read_text() == "new"


def test_a_folder_takes_the_place_of_another(tmp_path):
    for text in ("first", "second"):
        write(tmp_path / "folder", text)
        assert tree(tmp_path) == {"folder/file": text}


def test_a_failure_keeps_the_old_folder_and_leaves_nothing_behind(tmp_path):
    write(tmp_path / "folder", "old")

    def fail():
        with replacing(tmp_path / "folder") as building:
            building.mkdir()
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert tree(tmp_path) == {"folder/file": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_the_system_refuses_is_told_with_the_path(tmp_path):
    def fail():
        with replacing(tmp_path / "file"):
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="file was not written, and nothing has changed: no space left on device"):
        fail()


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ({"building": "half"}, None),
        ({"path": "old", "building": "half"}, "old"),
        ({"path": "old", "ready": "new"}, "old"),
        ({"old": "old", "ready": "new"}, "new"),
        ({"old": "old"}, "old"),
        ({"path": "new", "old": "old"}, "new"),
    ],
)
def test_every_state_that_a_crash_can_leave_is_put_right(tmp_path, states, expected):
    for state, text in states.items():
        folder = tmp_path / ("folder" if state == "path" else f".folder.patching-{state}")
        folder.mkdir()
        (folder / "file").write_text(text)
    recover(tmp_path / "folder")
    assert tree(tmp_path) == ({} if expected is None else {"folder/file": expected})
    assert all(path.name == "folder" for path in tmp_path.iterdir())


def test_a_replacement_under_way_is_let_alone(tmp_path):
    write(tmp_path / "folder", "old")
    with replacing(tmp_path / "folder") as building:
        building.mkdir()
        (building / "file").write_text("new")
        recover(tmp_path / "folder")
        assert tree(tmp_path / "folder") == {"file": "old"}
    assert tree(tmp_path / "folder") == {"file": "new"}


def test_it_works_where_there_are_no_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    write(tmp_path / "folder", "new")
    assert tree(tmp_path) == {"folder/file": "new"}


def test_a_mirror_shares_files_or_copies_them(tmp_path):
    source = tmp_path / "source"
    (source / "inside").mkdir(parents=True)
    for name in ("a", "left", "inside/left"):
        (source / name).write_text(name)
    (source / "link").symlink_to("a")
    mirror(source, tmp_path / "linked", {"left"}, link=True)
    mirror(source, tmp_path / "copied", {"left"})
    for name in ("linked", "copied"):
        assert tree(tmp_path / name) == {"a": "a", "link": "a", "inside/left": "inside/left"}
    assert (source / "a").samefile(tmp_path / "linked" / "a")
    assert (tmp_path / "linked" / "link").is_symlink()
    assert not (source / "a").samefile(tmp_path / "copied" / "a")
    assert not (tmp_path / "copied" / "link").is_symlink()


def test_a_mirror_copies_where_it_cannot_link(tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a").write_text("a")

    def refuse(*_):
        raise OSError("not on this file system")

    monkeypatch.setattr("os.link", refuse)
    mirror(tmp_path / "source", tmp_path / "target", link=True)
    assert tree(tmp_path / "target") == {"a": "a"}
