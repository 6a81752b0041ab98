"""A complete cache that this process may only read, such as that of another user."""

import pytest
import small_shop
from toy_graph import toy_graph


def shop(folder):
    return small_shop.shop(folder / "shop")


def graph(folder):
    return toy_graph(folder / "graph")


def entries(root):
    """Return modification time and permissions of all files and folders."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_mode) for path in (root, *root.rglob("*"))}


@pytest.mark.parametrize("make", [shop, graph])
def test_a_complete_cache_is_only_read(tmp_path, monkeypatch, make):
    cache = tmp_path / "cache"
    monkeypatch.setenv("MALLEABLE_CACHE", str(cache))

    def load():
        data = make(tmp_path)
        data.prepare_data()
        data.setup("fit")
        return len(data.train_dataset), getattr(data, "graph", None) or data.catalog

    written = load()
    folders = [path for path in (cache, *cache.rglob("*")) if path.is_dir()]
    assert len(folders) > 2
    for path in (*cache.rglob("*"), cache):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = entries(cache)
    try:
        assert load() == written
        # The superuser may write despite the permissions.
        assert entries(cache) == before
    finally:
        for path in folders:
            path.chmod(0o755)
