"""Export of the vectors of users and items, for serving by a nearest-neighbour index or a vector database."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import load_file, save_file
from torch import Tensor

from malleable.datamodules.batch import Catalog
from malleable.datamodules.files.atomic import atomic_write, recover, temporary_folder

Format = Literal["parquet", "safetensors"]
ROWS = 4096
"""Number of rows of a row group in Parquet."""


class VectorWriter(Callback):
    """Write the vectors of users and items during prediction. The score of an item for a user is the inner product of both vectors.

    The module must have a method ``encode(batch)``, which returns ``(B, d)``, and a method ``item_vectors()``, which returns ``(N, d)``, such as
    :class:`~malleable.lightning_modules.recommendation.sequential.SequentialRecommender`.

    ``parquet``: ``item_vectors.parquet`` has the columns ``item_id``, ``title`` and ``vector`` (list of float32), in the order of the catalogue, but
    no items that the model was not trained on. ``user_vectors.parquet`` has ``sample_id``, ``user_id`` (if the rows have users) and ``vector``, by
    ``sample_id``. ``safetensors``: ``item_vectors.safetensors`` and ``user_vectors.safetensors`` have the tensor ``vectors``; the other columns are
    in ``*.jsonl`` files of the same name, one line for each vector. The files do not depend on the number of devices.

    Args:
        dirpath: Folder of the files; default: the run folder.
        formats: File formats: ``parquet``, ``safetensors``.

    Raises:
        ValueError: If a format is unknown.
    """

    def __init__(self, dirpath: str | None = None, formats: Sequence[Format] = ("parquet",)) -> None:
        if not formats or (unknown := sorted(set(formats) - {"parquet", "safetensors"})):
            raise ValueError(f"formats must be parquet, safetensors or both, got {unknown if formats else 'none'}")
        self.dirpath = dirpath
        self.formats = tuple(formats)
        self.folder: Path | None = None
        self._parts: Path | None = None
        self._exit_stack = ExitStack()
        self._rows: list[tuple[Tensor, Tensor]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the output folder, and check that the module has vectors.

        Raises:
            MisconfigurationException: If the module has no vectors or no catalogue.
        """
        self.folder = Path(self.dirpath or trainer.log_dir or trainer.default_root_dir)
        if stage != "predict":
            return
        missing = [name for name in ("encode", "item_vectors", "catalog") if not hasattr(pl_module, name)]
        if missing:
            raise MisconfigurationException(
                f"VectorWriter needs a module with vectors of users and items, but {type(pl_module).__name__} has no `{missing[0]}`; "
                "use SequentialRecommender, or remove VectorWriter"
            )

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the vectors of the items, and create a temporary folder for those of the users."""
        assert self.folder is not None
        self._discard()
        catalog, vectors = _catalog(trainer, pl_module), pl_module.item_vectors().float().cpu()  # type: ignore[operator]
        if trainer.is_global_zero:
            # Items that a checkpoint does not know have no vector yet.
            trained = getattr(pl_module, "trained_items", torch.ones(len(vectors), dtype=torch.bool)).cpu().nonzero().flatten()
            columns = {"item_id": catalog.keys or catalog.titles, "title": catalog.titles}
            self._write("item_vectors", {name: [own[item] for item in trained.tolist()] for name, own in columns.items()}, vectors[trained])
            recover(self.folder / "user_vectors")
            self._parts = self._exit_stack.enter_context(temporary_folder(self.folder / "user_vectors"))
        self._parts = Path(trainer.strategy.broadcast(str(self._parts)))

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Compute the vectors of the rows of a batch, without repeated rows."""
        vectors, real = pl_module.encode(batch).float(), batch.sample_id >= 0  # type: ignore[operator]
        self._rows.append((batch.sample_id[real].cpu(), vectors[real].cpu()))

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the vectors of all ranks on rank zero."""
        assert self._parts is not None
        width = pl_module.item_vectors().shape[1]  # type: ignore[operator]
        rows = self._rows or [(torch.zeros(0, dtype=torch.long), torch.zeros(0, width))]
        sample_id, vectors = (torch.cat(column) for column in zip(*rows, strict=True))
        save_file({"sample_id": sample_id, "vectors": vectors}, self._part(trainer.global_rank))
        self._rows = []
        trainer.strategy.barrier("vectors of each device")
        if trainer.is_global_zero:
            self._merge(trainer)
        trainer.strategy.barrier("vectors")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the temporary files of the devices."""
        self._discard()

    def _merge(self, trainer: Trainer) -> None:
        paths = [self._part(rank) for rank in range(trainer.world_size)]
        if missing := [path for path in paths if not path.is_file()]:
            raise MisconfigurationException(
                f"{missing[0]} does not exist on this machine: all devices must write to one folder on a shared file system; set `dirpath` of "
                "VectorWriter to such a folder"
            )
        parts = [load_file(path) for path in paths]
        sample_id, vectors = (torch.cat([part[name] for part in parts]) for name in ("sample_id", "vectors"))
        order = sample_id.argsort(stable=True)
        columns: dict[str, list[Any]] = {"sample_id": sample_id[order].tolist()}
        users = getattr(getattr(trainer, "datamodule", None), "predicted_users", None)
        if users is not None:
            columns["user_id"] = [users.get(number, "") for number in columns["sample_id"]]
        self._write("user_vectors", columns, vectors[order])
        self._discard()
        rank_zero_info(f"wrote the vectors of {len(order)} rows and of all items to {self.folder}")

    def _part(self, rank: int) -> Path:
        assert self._parts is not None
        return self._parts / f"{rank}.safetensors"

    def _discard(self) -> None:
        self._rows = []
        self._exit_stack.close()

    def _write(self, name: str, columns: dict[str, list[Any]], vectors: Tensor) -> None:
        """Write a file of each format, each of them atomically."""
        assert self.folder is not None
        if "parquet" in self.formats:
            values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.flatten().numpy()), vectors.shape[1])
            with atomic_write(self.folder / f"{name}.parquet") as path:
                pq.write_table(pa.table({**columns, "vector": values}), path, row_group_size=ROWS)
        if "safetensors" in self.formats:
            with atomic_write(self.folder / f"{name}.safetensors") as path:
                save_file({"vectors": vectors.contiguous()}, path)
            with atomic_write(self.folder / f"{name}.jsonl") as path:
                lines = (json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) for row in zip(*columns.values(), strict=True))
                path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _catalog(trainer: Trainer, module: LightningModule) -> Catalog:
    """Return the catalogue of the module; that of the data module if only the latter has ids."""
    own, other = module.catalog, getattr(getattr(trainer, "datamodule", None), "catalog", None)
    assert isinstance(own, Catalog)
    return other if not own.keys and isinstance(other, Catalog) and other.titles == own.titles else own
