"""Reading of rows with PyTorch's DataLoader, whose workers are kept between epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, default_collate

WORKER_OPTIONS = ("num_workers", "prefetch_factor", "worker_init_fn", "persistent_workers", "timeout", "multiprocessing_context")


class _Batches:
    """Batch sampler whose batches are replaced before each epoch."""

    def __init__(self) -> None:
        self.rows: Sequence[list[int]] = ()

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


class RowReader:
    """Reader of given batches of a dataset.

    Workers start with the first batches and run until :meth:`stop`, so that epochs do not start processes. A worker has a copy of the dataset from
    the time when the worker started; ``persistent_workers=False`` starts new workers in each epoch.

    Args:
        dataset: Map-style dataset.
        collate_fn: Function that collates rows to a batch.
        num_workers: Number of worker processes; 0 reads in this process.
        persistent_workers: Keep the workers between epochs.
        options: Other arguments of :class:`torch.utils.data.DataLoader` that ``WORKER_OPTIONS`` lists.
    """

    def __init__(
        self,
        dataset: Any,
        collate_fn: Callable[[Sequence[Any]], Any] | None,
        *,
        num_workers: int = 0,
        persistent_workers: bool = True,
        **options: Any,
    ) -> None:
        self.dataset = dataset
        self.collate_fn = collate_fn
        # Without workers, PyTorch does not accept options for them.
        self.options = {**options, "num_workers": num_workers, "persistent_workers": persistent_workers} if num_workers else {}
        self._batches = _Batches()
        self._loader: DataLoader[Any] | None = None

    def read(self, batches: Sequence[list[int]]) -> Iterable[Any]:
        """Return an iterable over the collated batches. With workers, consume or delete it before the next call.

        Args:
            batches: Positions in the dataset of the rows of each batch.
        """
        if not self.options.get("persistent_workers"):
            return DataLoader(self.dataset, batch_sampler=batches, collate_fn=self.collate_fn, **self.options)
        self._batches.rows = batches
        if self._loader is None:
            self._loader = DataLoader(self.dataset, batch_sampler=self._batches, collate_fn=self.collate_fn, **self.options)
        return self._loader

    def stop(self) -> None:
        """Stop the workers; the next call of :meth:`read` starts new ones."""
        self._loader = None


def options_of(loader: DataLoader[Any]) -> dict[str, Any]:
    """Return the settings of a DataLoader as arguments of ``PhasedLoader``.

    Raises:
        ValueError: If the DataLoader has settings that global batches do not support.
    """
    refused = {
        "an IterableDataset": isinstance(loader.dataset, IterableDataset),
        "a batch_sampler": not isinstance(loader.dataset, IterableDataset) and loader.batch_size is None,
        "a sampler": not _is_plain(loader),
        "a generator": loader.generator is not None,
        "the default collate_fn": loader.collate_fn is default_collate,
    }
    for what, has in refused.items():
        if has:
            raise ValueError(
                f"PhasedLoader does not support {what} of a DataLoader: it orders the rows by `seed` and epoch, and needs a map-style dataset and a "
                "collate_fn that returns a Batch; give DataLoader(dataset, batch_size, shuffle=..., drop_last=..., "
                "collate_fn=malleable.datamodules.collate.collate), and select rows with torch.utils.data.Subset"
            )
    options = {name: getattr(loader, name) for name in WORKER_OPTIONS}
    return {
        **options,
        "batch_size": loader.batch_size,
        "collate_fn": loader.collate_fn,
        "shuffle": isinstance(loader.sampler, RandomSampler),
        "drop_last": loader.drop_last,
        "pin_memory": loader.pin_memory,
    }


def _is_plain(loader: DataLoader[Any]) -> bool:
    """Return whether the sampler of a loader is one of those that ``shuffle`` creates."""
    sampler = loader.sampler
    if isinstance(loader.dataset, IterableDataset) or type(sampler) is SequentialSampler:
        return True
    return type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
