"""Index of items for exact search by embedding.

Shapes: B queries, N items, d width, k results.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from malleable.datamodules.files.atomic import atomic_write, recover
from malleable.datamodules.files.escape import brief_repr
from malleable.datamodules.files.sealed import MANIFEST, find_damage, seal
from malleable.datamodules.files.text_files import read_json
from malleable.datamodules.files.user_files import first_line
from malleable.lightning_modules.functional.search.nearest import search_space
from malleable.lightning_modules.functional.search.vector_space import Metric, VectorSpace, unit_rows
from malleable.lightning_modules.patches.tensors import load_tensors, tensor_bytes

Backend = Literal["torch", "faiss"]
Id = str | int

_FORMAT = "item index 1"
_EMBEDDINGS = "embeddings.safetensors"
_ITEMS = "items.json"


class FoundItems(NamedTuple):
    """Items found for each query, nearest first.

    Attributes:
        positions: ``(B, k)`` int64, positions in the index, padded with -1.
        ids: For each query its ids, without padding.
        scores: ``(B, k)`` float32, ``-inf`` for padding.
    """

    positions: Tensor
    ids: list[list[Id]]
    scores: Tensor


class ItemIndex:
    """Index of items, with exact search for the items nearest to a query.

    Items with equal scores are ordered by position. Results do not depend on the batch of queries, the device or the backend.

    Args:
        embeddings: ``(N, d)``. The index has a copy in float32, which is scaled to length 1 for ``cosine``.
        ids: Distinct ids of the items. Default: 0 to N - 1.
        metric: ``cosine``, ``dot`` (inner product), or ``l2`` (negative Euclidean distance).
        titles: Title of each item.
        backend: ``torch``, or ``faiss`` (on a CPU only): candidates are found by a flat index of FAISS, which has another copy of the embeddings.
            Searches with ``filter_mask`` or ``exclude_ids`` always use torch.

    Attributes:
        embeddings: ``(N, d)`` float32, as searched.
        ids: Ids by position.
        titles: Titles by position, or ``None``.
        metric: The metric.
        backend: The backend.

    Raises:
        ValueError: If a number is not finite, an id occurs twice, or lengths differ.
        ImportError: If the backend is ``faiss``, which is not installed.
    """

    def __init__(
        self,
        embeddings: Tensor,
        ids: Sequence[Id] | None = None,
        metric: Metric = "cosine",
        titles: Sequence[str] | None = None,
        backend: Backend = "torch",
    ) -> None:
        if embeddings.ndim != 2 or not embeddings.is_floating_point():
            raise ValueError(f"embeddings must be floating-point numbers of shape (N, d), got {embeddings.dtype} of shape {tuple(embeddings.shape)}")
        own = embeddings.detach()
        own = unit_rows(own) if metric == "cosine" else own.to(torch.float32, copy=True).contiguous()
        self._fill(own, range(len(own)) if ids is None else ids, metric, titles, backend)

    def _fill(self, embeddings: Tensor, ids: Sequence[Id], metric: Metric, titles: Sequence[str] | None, backend: Backend) -> None:
        """Set all attributes, with embeddings that are scaled already."""
        if metric not in get_args(Metric):
            raise ValueError(f"metric must be one of {', '.join(get_args(Metric))}; got {metric!r}")
        self.embeddings, self.metric, self.backend = embeddings, metric, backend
        self.ids: list[Id] = list(ids)
        self.titles = None if titles is None else list(titles)
        _check_items(self.ids, self.titles, len(embeddings))
        self._positions = {id: position for position, id in enumerate(self.ids)}
        self._fingerprint: str | None = None
        self._faiss = _backend(backend)
        self._prepare()
        if self._space.usable is not None:
            position = int((~self._space.usable).nonzero()[0, 0])
            raise ValueError(f"the embedding of item {self.ids[position]!r} (position {position}) is not finite; leave the item out")

    def _prepare(self) -> None:
        """Prepare the search on the device of the embeddings."""
        if self.backend == "faiss" and self.embeddings.device.type != "cpu":
            raise ValueError(f"backend 'faiss' searches on a CPU only, not on {self.embeddings.device}; use backend 'torch'")
        self._space = VectorSpace(self.embeddings, "l2" if self.metric == "l2" else "dot")
        if self._faiss is not None:
            self._flat = (self._faiss.IndexFlatL2 if self.metric == "l2" else self._faiss.IndexFlatIP)(self.embeddings.shape[1])
            self._flat.add(self._space.form(self.embeddings).numpy())

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def fingerprint(self) -> str:
        """Hash of metric, ids, titles and embeddings."""
        if self._fingerprint is None:
            digest = hashlib.sha256(json.dumps([self.metric, self.ids, self.titles, list(self.embeddings.shape)]).encode())
            digest.update(tensor_bytes(self.embeddings.cpu()))
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def search(self, queries: Tensor, k: int, filter_mask: Tensor | None = None, exclude_ids: Sequence[Sequence[Id]] | None = None) -> FoundItems:
        """Find the k nearest items of each query.

        Args:
            queries: ``(B, d)``; moved to the device of the index.
            k: Number of items.
            filter_mask: ``(N,)`` or ``(B, N)`` bool, items that may be returned; default: all.
            exclude_ids: For each query, ids of items that are not returned, such as those that the user has seen.

        Raises:
            ValueError: If a shape does not fit, ``k`` is below 1, or an excluded id is not in the index.
        """
        device = self.embeddings.device
        allowed = None if filter_mask is None else filter_mask.to(device)
        exclude = None if exclude_ids is None else self._excluded(exclude_ids, len(queries)).to(device)
        queries = queries.detach().to(device)
        if self.metric == "cosine":
            queries = unit_rows(queries)
        first_pass = self._candidates if self.backend == "faiss" else None
        found = search_space(self._space, queries, k, allowed=allowed, exclude=exclude, first_pass=first_pass)
        ids = [[self.ids[item] for item in row if item >= 0] for row in found.items.tolist()]
        return FoundItems(found.items, ids, found.scores)

    def to(self, device: torch.device | str) -> Self:
        """Move the index to a device, and return it.

        Raises:
            ValueError: If the backend is ``faiss`` and the device is not a CPU.
        """
        self.embeddings = self.embeddings.to(device)
        self._prepare()
        return self

    def save(self, folder: str | Path) -> Path:
        """Write the index to a folder atomically, with checksums, and return the folder.

        Args:
            folder: New folder, or that of an index, which is replaced.

        Raises:
            FileExistsError: If the path exists and is not an index.
            OSError: If writing fails; nothing has changed then.
        """
        folder = Path(folder)
        recover(folder)
        if folder.exists() and not _is_index(folder):
            raise FileExistsError(f"{folder} exists and is not an item index; give a new folder")
        with atomic_write(folder) as building:
            building.mkdir()
            save_file({"embeddings": self.embeddings.cpu()}, building / _EMBEDDINGS)
            (building / _ITEMS).write_text(json.dumps({"ids": self.ids, "titles": self.titles}), encoding="utf-8")
            seal(building, {"format": _FORMAT, "metric": self.metric, "fingerprint": self.fingerprint})
        return folder

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu", backend: Backend = "torch") -> Self:
        """Load an index that :meth:`save` has written.

        Args:
            folder: The folder.
            device: Device of the index.
            backend: As in the constructor.

        Raises:
            FileNotFoundError: If the folder is not an index.
            ValueError: If a file is damaged.
        """
        _backend(backend)
        folder = Path(folder)
        recover(folder)
        if not (folder / MANIFEST).is_file():
            raise FileNotFoundError(f"{folder} is not an item index: it has no {MANIFEST}; give a folder that ItemIndex.save has written")
        remedy = "build the index again, or copy it again"
        if damage := find_damage(folder):
            raise ValueError(f"the item index {folder} {damage}; {remedy}")
        if not _is_index(folder):
            raise ValueError(f"{folder} is not an item index that this version of malleable reads ({_FORMAT}); {remedy}")
        manifest, items = read_json(folder / MANIFEST), read_json(folder / _ITEMS)
        tensors = load_tensors(folder / _EMBEDDINGS)
        index = cls.__new__(cls)
        try:
            embeddings = tensors["embeddings"]
            if embeddings.ndim != 2 or embeddings.dtype != torch.float32:
                raise ValueError(f"embeddings are {embeddings.dtype} of shape {tuple(embeddings.shape)}")
            index._fill(embeddings, items["ids"], manifest["metric"], items["titles"], backend)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the item index {folder} is damaged ({first_line(error)}); {remedy}") from error
        return index.to(device)

    def _excluded(self, exclude_ids: Sequence[Sequence[Id]], count: int) -> Tensor:
        """Return the positions of ids ``(B, E)``, padded with -1."""
        if len(exclude_ids) != count:
            raise ValueError(f"exclude_ids must have a list of ids for each of the {count} queries, got {len(exclude_ids)} lists")
        rows = []
        for number, ids in enumerate(exclude_ids):
            if isinstance(ids, (str, int)):
                raise ValueError(f"exclude_ids must have a list of ids for each query, but entry {number} is {ids!r}; give [{ids!r}]")
            unknown = next((id for id in ids if id not in self._positions), None)
            if unknown is not None:
                some = repr(self.ids[0]) if self.ids else "none"
                raise ValueError(f"exclude_ids, entry {number}: {unknown!r} is not an id of this index, whose first id is {some}; leave it out")
            rows.append([self._positions[id] for id in ids])
        width = max(map(len, rows), default=0)
        return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.long).reshape(count, width)

    def _candidates(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the candidates of the flat index of FAISS; see :data:`~malleable.lightning_modules.functional.search.nearest.FirstPass`."""
        found, positions = self._flat.search(queries.numpy(), min(count, len(self)))
        products, items = torch.from_numpy(found), torch.from_numpy(positions)
        if self.metric == "l2":
            # FAISS returns squared distances.
            products = (queries.square().sum(1, keepdim=True) - products) / 2
        padding = 0, count - items.shape[1]
        products = torch.nn.functional.pad(products.masked_fill(items < 0, -torch.inf), padding, value=-torch.inf)
        return torch.nn.functional.pad(items, padding, value=-1), products


def _is_index(folder: Path) -> bool:
    """Return whether a folder has the manifest of an index."""
    try:
        manifest = read_json(folder / MANIFEST)
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == _FORMAT


def _check_items(ids: list[Id], titles: list[str] | None, count: int) -> None:
    """Raise an error for ids and titles that do not fit the embeddings."""
    for name, values in (("ids", ids), ("titles", titles)):
        if values is not None and len(values) != count:
            raise ValueError(f"{name} must have one entry for each of the {count} embeddings, got {len(values)}")
    for position, id in enumerate(ids):
        if isinstance(id, bool) or not isinstance(id, (str, int)):
            raise ValueError(f"ids must be strings or integers, but the id at position {position} is {brief_repr(id, 200)}")
    if len(set(ids)) < count:
        known: dict[Id, int] = {}
        first, second = next((known[id], position) for position, id in enumerate(ids) if known.setdefault(id, position) != position)
        raise ValueError(f"ids must be distinct, but {ids[second]!r} is at positions {first} and {second}; leave one out")
    for position, title in enumerate(titles or []):
        if not isinstance(title, str):
            raise ValueError(f"titles must be strings, but the title at position {position} is {brief_repr(title, 200)}")


def _backend(name: str) -> Any:
    """Return the package of a backend, ``None`` for torch."""
    if name not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}; got {name!r}")
    if name == "torch":
        return None
    try:
        return import_module("faiss")
    except ImportError as error:
        raise ImportError("backend 'faiss' needs FAISS; run `pip install 'malleable[search]'`, or use backend 'torch'") from error
