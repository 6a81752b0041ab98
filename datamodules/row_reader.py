"""Reading of rows through PyTorch's DataLoader, with workers that live on from epoch to epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, default_collate

WORKER_OPTIONS = ("num_workers", "prefetch_factor", "worker_init_fn", "persistent_workers", "timeout", "multiprocessing_context")


class _Batches:
    """A batch sampler whose batches are exchanged for each epoch."""

    def __init__(self) -> None:
        self.rows: Sequence[list[int]] = ()

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


class RowReader:
    """Collated batches of given rows of a dataset.

    Workers start with the first batches and live until :meth:`stop`, so that an epoch costs no start-up of processes. They hold a copy of the
    dataset as it was then; ``persistent_workers=False`` makes new ones for each epoch.

    Args:
        dataset: Map-style dataset.
        collate_fn: Makes a batch of rows.
        num_workers: Worker processes; 0 reads in this process.
        persistent_workers: Keep the workers between epochs.
        options: More arguments of :class:`torch.utils.data.DataLoader`, those of ``WORKER_OPTIONS``.
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
        # Without workers PyTorch takes no options for them.
        self.options = {**options, "num_workers": num_workers, "persistent_workers": persistent_workers} if num_workers else {}
        self._batches = _Batches()
        self._loader: DataLoader[Any] | None = None

    def read(self, batches: Sequence[list[int]]) -> Iterable[Any]:
        """Return the batches of these rows, in order; with workers, one call must be read or dropped before the next."""
        if not self.options.get("persistent_workers"):
            return DataLoader(self.dataset, batch_sampler=batches, collate_fn=self.collate_fn, **self.options)
        self._batches.rows = batches
        if self._loader is None:
            self._loader = DataLoader(self.dataset, batch_sampler=self._batches, collate_fn=self.collate_fn, **self.options)
        return self._loader

    def stop(self) -> None:
        """End the workers; reading again starts new ones."""
        self._loader = None


def options_of(loader: DataLoader[Any]) -> dict[str, Any]:
    """Take a DataLoader apart, and return what its order, batches and workers are, as arguments of ``PhasedLoader``.

    Raises:
        ValueError: If it has what global batches with an order of their own cannot keep.
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
                f"PhasedLoader cannot keep {what} of a DataLoader: it makes the order of the rows from `seed` and the epoch, cuts it into global "
                "batches, and needs a map-style dataset and a collate_fn that makes a Batch; give DataLoader(dataset, batch_size, shuffle=..., "
                "drop_last=..., collate_fn=malleable.datamodules.batch.collate), and choose rows beforehand with torch.utils.data.Subset"
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
    """Whether the order of a loader is the one that ``shuffle`` stands for."""
    sampler = loader.sampler
    if isinstance(loader.dataset, IterableDataset) or type(sampler) is SequentialSampler:
        return True
    return type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
