import os
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest

from malleable.datamodules.files import atomic as files
from malleable.datamodules.files.atomic import atomic_write, locked, recover_below


def fill(folder, text="x"):
    folder.mkdir()
    (folder / "a").write_text(text)
    (folder / "b").write_text(text)


def write(path, kind, text):
    with atomic_write(path) as temporary:
        fill(temporary, text) if kind == "folder" else temporary.write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def text_of(path):
    return {(path / name).read_text() for name in "ab"} if path.is_dir() else {path.read_text()}


@pytest.fixture(params=["file", "folder"])
def kind(request):
    return request.param


@pytest.fixture(params=["exchange", "renames"])
def system(request, monkeypatch):
    """With the system's exchange of two folders, and without it."""
    if request.param == "renames":
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)


@pytest.mark.usefixtures("system")
def test_writes_and_replaces(tmp_path, kind):
    path = tmp_path / "new" / "name.txt"
    for text in ("one", "two"):
        write(path, kind, text)
        assert text_of(path) == {text}
    assert names(path.parent) == ["name.txt"]


def test_the_temporary_path_has_the_same_name_and_parent_file_system(tmp_path):
    with atomic_write(tmp_path / "figure.png") as temporary:
        assert temporary.name == "figure.png"
        assert temporary.parent.parent == tmp_path
        temporary.write_text("x")


def test_error_keeps_the_old_content_and_removes_temporary_files(tmp_path, kind):
    path = tmp_path / "name"
    write(path, kind, "old")

    def interrupted():
        with atomic_write(path) as temporary:
            fill(temporary) if kind == "folder" else temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert text_of(path) == {"old"}
    assert names(tmp_path) == ["name"]


def test_permissions_follow_the_umask(tmp_path, kind):
    path = tmp_path / "name"
    old = os.umask(0o027)
    try:
        with atomic_write(path) as temporary:
            if kind == "folder":
                temporary.mkdir()
            file = temporary / "weights" if kind == "folder" else temporary
            file.write_text("x")
            file.chmod(0o600)  # as safetensors and tempfile create files
    finally:
        os.umask(old)
    assert stat.S_IMODE((path / "weights" if kind == "folder" else path).stat().st_mode) == 0o640
    if kind == "folder":
        assert stat.S_IMODE(path.stat().st_mode) == 0o750


def test_permissions_of_hard_links_are_unchanged(tmp_path):
    (tmp_path / "original").write_text("x")
    (tmp_path / "original").chmod(0o400)
    with atomic_write(tmp_path / "folder") as temporary:
        temporary.mkdir()
        os.link(tmp_path / "original", temporary / "link")
    assert stat.S_IMODE((tmp_path / "original").stat().st_mode) == 0o400


def test_a_symbolic_link_is_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "real")
    write(tmp_path / "link", "file", "x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "real").read_text() == "x"


def test_keep_is_called_with_content_of_another_process(tmp_path, kind):
    path = tmp_path / "name"
    for keep, left in ((lambda path: True, "theirs"), (lambda path: False, "ours")):
        with atomic_write(path, keep=keep) as temporary:
            write(path, kind, "theirs")
            fill(temporary, "ours") if kind == "folder" else temporary.write_text("ours")
        assert text_of(path) == {left}
    assert names(tmp_path) == ["name"]


KILLED = """
import os, signal, sys
from pathlib import Path
from malleable.datamodules.files.atomic import atomic_write, locked
with atomic_write(Path(sys.argv[1])) as temporary:
    temporary.mkdir()
    (temporary / "a").write_text("half")
    print("there", flush=True)
    if len(sys.argv) > 2:
        sys.stdin.read()
    else:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_only_temporary_folders_of_killed_processes_are_removed(tmp_path, kind):
    path = tmp_path / "na[m]e"
    assert subprocess.run([sys.executable, "-c", KILLED, path], stdout=subprocess.DEVNULL, check=False).returncode == -signal.SIGKILL
    with subprocess.Popen([sys.executable, "-c", KILLED, path, "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdout.readline() == b"there\n"
        assert len(names(tmp_path)) == 1  # the killed one's is gone
        write(path, kind, "ours")
        assert len(names(tmp_path)) == 2
        running.kill()
    write(path, kind, "last")
    assert names(tmp_path) == ["na[m]e"]
    assert text_of(path) == {"last"}


def test_folder_moved_by_a_killed_process_is_restored(tmp_path):
    left = tmp_path / ".name.abc.tmp"
    left.mkdir()
    fill(left / "name.old", "old")
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "name"):
        raise RuntimeError
    assert text_of(tmp_path / "name") == {"old"}
    assert names(tmp_path) == ["name"]


def test_recover_below_removes_temporary_folders(tmp_path):
    left = tmp_path / "run/checkpoints/.last.ckpt.abc.tmp"
    left.mkdir(parents=True)
    (left / "last.ckpt").write_text("half")
    with atomic_write(tmp_path / "run/report/page") as temporary:
        temporary.write_text("whole")
        recover_below(tmp_path)
        assert not left.exists()
    assert (tmp_path / "run/report/page").read_text() == "whole"


WRITER = """
import sys
from pathlib import Path
from malleable.datamodules.files.atomic import atomic_write, locked
path, kind, text = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
for _ in range(40):
    with atomic_write(path) as temporary:
        if kind == "folder":
            temporary.mkdir()
            for name in "ab":
                (temporary / name).write_text(text)
        else:
            temporary.write_text(text)
"""


def test_concurrent_writes(tmp_path, kind):
    path = tmp_path / "name"
    write(path, kind, "0")
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, path, kind, text]) for text in "12"]
    while any(writer.poll() is None for writer in writers):
        # A file always reads whole; of a folder the path always exists.
        assert path.exists()
        if kind == "file":
            assert path.read_text() in "012"
        time.sleep(0.001)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert len(text_of(path)) == 1
    assert names(tmp_path) == ["name"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_lock_makes_read_and_write_atomic(tmp_path, kind):
    path = tmp_path / "count"
    place = path / "number" if kind == "folder" else path

    def write(number):
        with atomic_write(path) as building:
            if kind == "folder":
                building.mkdir()
            (building / "number" if kind == "folder" else building).write_text(str(number))

    def work():
        for _ in range(5):
            with locked(path):
                number = int(place.read_text())
                time.sleep(0.001)
                write(number + 1)

    write(0)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert place.read_text() == "20"
    assert list(tmp_path.iterdir()) == [path]
