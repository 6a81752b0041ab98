"""Second moments of keys over text: streamed, shared among ranks, kept on disk, taken up again where they were interrupted."""

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

from malleable.datamodules.files.atomic import atomic_write
from malleable.datamodules.files.user_files import first_line
from malleable.datamodules.stored_identity import rules_digest
from malleable.lightning_modules.editing.layout import Layout
from malleable.lightning_modules.editing.passes import stopping
from malleable.lightning_modules.functional.editing.null_space import SecondMoment
from malleable.lightning_modules.language.model_settings import model_settings
from malleable.lightning_modules.verified_file import load_verified, save_verified

log = logging.getLogger(__name__)

MARK = "{mark}"


@dataclass
class StatisticsSettings:
    """How second moments are taken.

    Attributes:
        max_length: Tokens of a text; the rest is cut off.
        max_tokens: Tokens of a pass, padding included, which bounds memory.
        piece: Texts between two points at which ranks add up and the file may be written.
        save_minutes: Time between two writings of the file.
        exclude_first: Leave out the first token of a text, whose keys are often hundreds of times longer than all others.

    Source:
        Meng et al. (2023), MEMIT, arXiv:2210.07229: all tokens of Wikipedia articles cut to the model's context.
    """

    max_length: int = 1024
    max_tokens: int = 8192
    piece: int = 512
    save_minutes: float = 10.0
    exclude_first: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("max_length", "max_tokens", "piece"):
            if getattr(self, name) < 1:
                raise ValueError(f"statistics.{name} must be >= 1, got {getattr(self, name)}")


def second_moments(
    model: nn.Module,
    layout: Layout,
    layers: Sequence[int],
    tokenizer: Any,
    texts: Sequence[str],
    settings: StatisticsSettings | None = None,
    file: Path | None = None,
) -> dict[int, SecondMoment]:
    """Take the second moments of the keys of layers over text, in one pass of the first blocks.

    Pieces of the text are added up in their order, whatever rank took them, so that any number of ranks gives the same bits. A run of several ranks
    must call it on all of them.

    Args:
        model: In evaluation mode.
        layout: Names of its parts.
        layers: Whose keys.
        tokenizer: Of the model.
        texts: What the model should go on saying.
        settings: See there.
        file: Where the sums are kept; what lies there is taken up. ``{mark}`` in its name becomes the identity of model, text and settings, so
            that others have files of their own.

    Raises:
        ValueError: If there is no text, or the file is of another model, text or setting.
    """
    if not texts:
        raise ValueError("second moments need text, got none")
    settings = settings or StatisticsSettings()
    widths = {layer: layout.projection_of(model, layer).width for layer in layers}
    device = next(model.parameters()).device
    # The sums wait on the CPU: of wide models they are as large as the weights.
    totals = {layer: SecondMoment(width) for layer, width in widths.items()}
    ranks = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    rank = distributed.get_rank() if ranks > 1 else 0
    mark = _mark(model, layout, layers, tokenizer, texts, settings)
    file = None if file is None else file.with_name(file.name.replace(MARK, mark[:12]))
    done = _taken_up(file, mark, totals) if file is not None and rank == 0 and file.exists() else 0
    if ranks > 1:
        done = _shared(done, totals, device)
    pieces = [texts[start : start + settings.piece] for start in range(0, len(texts), settings.piece)]
    written = time.monotonic()
    for start in range(done, len(pieces), ranks):
        own = {layer: SecondMoment(width, device) for layer, width in widths.items()}
        if start + rank < len(pieces):
            _add(model, layout, own, tokenizer, pieces[start + rank], settings)
        for turn in range(min(ranks, len(pieces) - start)):
            for layer, total in totals.items():
                total.merge(own[layer] if ranks == 1 else _from(turn, rank, own[layer]))
        finished = min(start + ranks, len(pieces))
        log.info("second moments: %s of %s texts", min(finished * settings.piece, len(texts)), len(texts))
        due = finished == len(pieces) or time.monotonic() - written >= 60 * settings.save_minutes
        if file is not None and rank == 0 and due:
            _write(file, mark, totals, finished)
            written = time.monotonic()
    return totals


def _add(
    model: nn.Module, layout: Layout, moments: dict[int, SecondMoment], tokenizer: Any, texts: Sequence[str], settings: StatisticsSettings
) -> None:
    device = next(model.parameters()).device
    with torch.no_grad(), stopping(model, layout, max(moments), list(moments)) as seen:
        for ids, mask in _batches(tokenizer, texts, settings):
            seen.run(input_ids=ids.to(device), attention_mask=mask.to(device))
            kept = mask.bool().to(device)
            if settings.exclude_first:
                kept[:, 0] = False
            for layer, moment in moments.items():
                moment.add(seen.keys[layer].reshape(*kept.shape, -1)[kept])


def _batches(tokenizer: Any, texts: Sequence[str], settings: StatisticsSettings) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of about equal length, filled up on the right."""
    rows = sorted((ids[: settings.max_length] for ids in tokenizer(list(texts))["input_ids"] if ids), key=len)
    while rows:
        length = len(rows[-1])
        number = max(1, settings.max_tokens // length)
        part, rows = rows[-number:], rows[:-number]
        ids, mask = torch.zeros(len(part), length, dtype=torch.long), torch.zeros(len(part), length, dtype=torch.long)
        for place, row in enumerate(part):
            ids[place, : len(row)], mask[place, : len(row)] = torch.tensor(row), 1
        yield ids, mask


def _shared(done: int, totals: dict[int, SecondMoment], device: torch.device) -> int:
    """Give all ranks what the first one took up."""
    counts = torch.tensor([done, *(total.count for total in totals.values())], device=device)
    distributed.broadcast(counts, 0)
    done, *numbers = counts.tolist()
    for number, total in zip(numbers if done else [], totals.values(), strict=bool(done)):
        moved = total.total.to(device)
        distributed.broadcast(moved, 0)
        total.total.copy_(moved)
        total.count = number
    return int(done)


def _from(turn: int, rank: int, own: SecondMoment) -> SecondMoment:
    """What the rank whose turn it is has."""
    shared = own if turn == rank else SecondMoment(len(own.total), own.total.device)
    count = torch.tensor(own.count, device=own.total.device)
    distributed.broadcast(shared.total, turn)
    distributed.broadcast(count, turn)
    shared.count = int(count)
    return shared


def _mark(model: nn.Module, layout: Layout, layers: Sequence[int], tokenizer: Any, texts: Sequence[str], settings: StatisticsSettings) -> str:
    """Identity of all that the moments depend on: model and its settings, tokenizer, text; of weights, 64 values of each."""
    digest = hashlib.sha256(layout.projection.encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().flatten()[:: max(1, parameter.numel() // 64)].double().cpu().numpy().tobytes())
    kept = {key: value for key, value in asdict(settings).items() if key not in ("max_tokens", "save_minutes")}
    computed = model_settings(model, scratch=False)
    digest.update(json.dumps([list(layers), kept, rules_digest(tokenizer), computed], sort_keys=True).encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def _write(file: Path, mark: str, totals: dict[int, SecondMoment], pieces: int) -> None:
    about = {"mark": mark, "pieces": str(pieces), "counts": json.dumps({layer: total.count for layer, total in totals.items()})}
    with atomic_write(file) as building:
        save_verified({str(layer): total.total.cpu() for layer, total in totals.items()}, building, about)


def _taken_up(file: Path, mark: str, totals: dict[int, SecondMoment]) -> int:
    try:
        stored, about = load_verified(file)
    except ValueError as error:
        if mark[:12] not in file.name:
            raise ValueError(f"{error}; remove it, give another file, or put {MARK} into the name") from error
        log.warning("%s: the second moments are taken again", error)
        return 0
    if about.get("mark") != mark:
        raise ValueError(
            f"{file} holds second moments of another model, text or setting (mark {about.get('mark', 'missing')[:12]}, here {mark[:12]}); "
            f"remove it, give another file, or put {MARK} into the name"
        )
    try:
        counts, pieces = json.loads(about["counts"]), int(about["pieces"])
        for layer, total in totals.items():
            total.total.copy_(stored[str(layer)])
            total.count = int(counts[str(layer)])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__}: {first_line(error)}); remove it, and it is made again") from error
    log.info("second moments: %s tokens taken up from %s", next(iter(totals.values())).count, file)
    return pieces
