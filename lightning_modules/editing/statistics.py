"""Second moments of keys over text: computed by all ranks together, stored in a file, and continued after an interruption."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from malleable.datamodules.files.atomic import atomic_write, recover
from malleable.datamodules.files.user_files import first_line
from malleable.datamodules.stored_identity import rules_digest
from malleable.lightning_modules.editing.layout import Layout
from malleable.lightning_modules.editing.partial_forward import capture_until
from malleable.lightning_modules.functional.editing.second_moments import SecondMoment
from malleable.lightning_modules.functional.number_checks import check_numbers
from malleable.lightning_modules.language.model_settings import model_settings
from malleable.lightning_modules.verified_file import load_verified, save_verified

log = logging.getLogger(__name__)

HASH = "{hash}"
"""Part of a file name that is replaced by a hash of model, text and settings."""


@dataclass
class StatisticsSettings:
    """Computation of second moments.

    Attributes:
        max_length: Maximum length of a text in tokens; the rest is truncated.
        max_tokens: Maximum number of tokens of a forward pass, including padding, which bounds memory.
        piece: Number of texts between two points at which the ranks add up their sums and the file may be written.
        save_minutes: Minimum time between two writes of the file.
        exclude_first: Exclude the first token of each text, whose keys are often hundreds of times longer than other keys.

    Source:
        Meng et al. (2023), MEMIT, arXiv:2210.07229: all tokens of Wikipedia articles, truncated to the maximum length of the model.
    """

    max_length: int = 1024
    max_tokens: int = 8192
    piece: int = 512
    save_minutes: float = 10.0
    exclude_first: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        check_numbers(self, "statistics.", at_least={"max_length": 1, "max_tokens": 1, "piece": 1, "save_minutes": 0})


def second_moments(
    model: nn.Module,
    layout: Layout,
    layers: Sequence[int],
    tokenizer: Any,
    texts: Sequence[str],
    settings: StatisticsSettings | None = None,
    file: Path | None = None,
) -> dict[int, SecondMoment]:
    """Compute the second moments of the keys of layers over text, in one pass through the first blocks.

    The texts are divided into pieces, whose sums are added in a fixed order. Therefore the result is the same bit by bit for any number of ranks. In
    a distributed run every rank must call this function.

    Args:
        model: Model in evaluation mode.
        layout: Names of its modules.
        layers: Layers whose keys are used.
        tokenizer: Tokenizer of the model.
        texts: Text that edits preserve.
        settings: Settings of the computation.
        file: File to store the sums in. If it exists, the computation continues from it. ``{hash}`` in its name is replaced by a hash of model, text
            and settings, so that each combination has its own file.

    Raises:
        ValueError: If there is no text, or if the file is damaged or belongs to another model, text or setting.
    """
    if not texts:
        raise ValueError("second moments need text, got none; give at least one text")
    settings = settings or StatisticsSettings()
    widths = {layer: layout.projection_of(model, layer).width for layer in layers}
    device = next(model.parameters()).device
    # The totals are on the CPU: for wide models they are as large as the weights.
    totals = {layer: SecondMoment(width) for layer, width in widths.items()}
    ranks = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    rank = distributed.get_rank() if ranks > 1 else 0
    content_hash = _content_hash(model, layout, layers, tokenizer, texts, settings)
    file = None if file is None else file.with_name(file.name.replace(HASH, content_hash[:12]))
    done = _load(file, content_hash, totals) if file is not None and rank == 0 else 0
    if ranks > 1:
        done = _broadcast_totals(done, totals, device)
    pieces = [texts[start : start + settings.piece] for start in range(0, len(texts), settings.piece)]
    written = time.monotonic()
    for start in range(done, len(pieces), ranks):
        own = {layer: SecondMoment(width, device) for layer, width in widths.items()}
        if start + rank < len(pieces):
            _add(model, layout, own, tokenizer, pieces[start + rank], settings)
        for source in range(min(ranks, len(pieces) - start)):
            for layer, total in totals.items():
                total.merge(own[layer] if ranks == 1 else _broadcast_moment(source, rank, own[layer]))
        finished = min(start + ranks, len(pieces))
        log.info("second moments: processed %s of %s texts", min(finished * settings.piece, len(texts)), len(texts))
        due = finished == len(pieces) or time.monotonic() - written >= 60 * settings.save_minutes
        if file is not None and rank == 0 and due:
            _write(file, content_hash, totals, finished)
            written = time.monotonic()
    return totals


def _add(
    model: nn.Module, layout: Layout, moments: dict[int, SecondMoment], tokenizer: Any, texts: Sequence[str], settings: StatisticsSettings
) -> None:
    """Add the keys of texts to the moments."""
    device = next(model.parameters()).device
    with torch.no_grad(), capture_until(model, layout, max(moments), list(moments)) as captured:
        for ids, mask in _batches(tokenizer, texts, settings):
            captured.run(input_ids=ids.to(device), attention_mask=mask.to(device))
            kept = mask.bool().to(device)
            if settings.exclude_first:
                kept[:, 0] = False
            for layer, moment in moments.items():
                moment.add(captured.keys[layer].reshape(*kept.shape, -1)[kept])


def _batches(tokenizer: Any, texts: Sequence[str], settings: StatisticsSettings) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield token ids and masks, ``(B, T)`` int64 each, of texts of similar length, padded on the right."""
    rows = sorted((ids[: settings.max_length] for ids in tokenizer(list(texts))["input_ids"] if ids), key=len)
    while rows:
        length = len(rows[-1])
        number = max(1, settings.max_tokens // length)
        part, rows = rows[-number:], rows[:-number]
        ids, mask = torch.zeros(len(part), length, dtype=torch.long), torch.zeros(len(part), length, dtype=torch.long)
        for place, row in enumerate(part):
            ids[place, : len(row)], mask[place, : len(row)] = torch.tensor(row), 1
        yield ids, mask


def _broadcast_totals(done: int, totals: dict[int, SecondMoment], device: torch.device) -> int:
    """Copy the totals that the first rank loaded to all ranks; return the number of finished pieces."""
    counts = torch.tensor([done, *(total.count for total in totals.values())], device=device)
    distributed.broadcast(counts, 0)
    done, *numbers = counts.tolist()
    for number, total in zip(numbers if done else [], totals.values(), strict=bool(done)):
        moved = total.total.to(device)
        distributed.broadcast(moved, 0)
        total.total.copy_(moved)
        total.count = number
    return int(done)


def _broadcast_moment(source: int, rank: int, own: SecondMoment) -> SecondMoment:
    """Return the second moment of rank ``source`` on all ranks."""
    received = own if source == rank else SecondMoment(len(own.total), own.total.device)
    count = torch.tensor(own.count, device=own.total.device)
    distributed.broadcast(received.total, source)
    distributed.broadcast(count, source)
    received.count = int(count)
    return received


def _content_hash(model: nn.Module, layout: Layout, layers: Sequence[int], tokenizer: Any, texts: Sequence[str], settings: StatisticsSettings) -> str:
    """Return a hash of layers, settings, tokenizer, text, and the model: its configuration, and 64 values of each weight."""
    state = hashlib.sha256(layout.projection.encode())
    for name, parameter in model.named_parameters():
        state.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        state.update(parameter.detach().flatten()[:: max(1, parameter.numel() // 64)].double().cpu().numpy().tobytes())
    # These two settings do not change the result.
    relevant = {key: value for key, value in asdict(settings).items() if key not in ("max_tokens", "save_minutes")}
    computed = model_settings(model, scratch=False)
    state.update(json.dumps([list(layers), relevant, rules_digest(tokenizer), computed], sort_keys=True).encode())
    for text in texts:
        state.update(hashlib.sha256(text.encode()).digest())
    return state.hexdigest()


def _write(file: Path, content_hash: str, totals: dict[int, SecondMoment], pieces: int) -> None:
    metadata = {"hash": content_hash, "pieces": str(pieces), "counts": json.dumps({layer: total.count for layer, total in totals.items()})}
    with atomic_write(file) as building:
        save_verified({str(layer): total.total.cpu() for layer, total in totals.items()}, building, metadata)


def _load(file: Path, content_hash: str, totals: dict[int, SecondMoment]) -> int:
    """Load the totals from the file; return the number of finished pieces, 0 if there is no file."""
    recover(file)  # a complete file is not written again, so nothing else removes the temporary folders of killed processes
    if not file.exists():
        return 0
    try:
        stored, metadata = load_verified(file)
    except ValueError as error:
        if content_hash[:12] not in file.name:
            raise ValueError(f"{error}; remove the file, give another one, or add {HASH} to its name") from error
        log.warning("%s: the second moments are computed again", error)
        return 0
    if metadata.get("hash") != content_hash:
        raise ValueError(
            f"{file} contains second moments of another model, text or setting (hash {metadata.get('hash', 'missing')[:12]}, expected "
            f"{content_hash[:12]}); remove the file, give another one, or add {HASH} to its name"
        )
    try:
        counts, pieces = json.loads(metadata["counts"]), int(metadata["pieces"])
        for layer, total in totals.items():
            total.total.copy_(stored[str(layer)])
            total.count = int(counts[str(layer)])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__}: {first_line(error)}); remove the file to compute them again") from error
    log.info("second moments: continuing after %s tokens, which are stored in %s", next(iter(totals.values())).count, file)
    return pieces
