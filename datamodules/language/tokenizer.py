"""Tokenizers: loading of pretrained tokenizers, training of a small tokenizer, digests, and storage in checkpoints."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from malleable.datamodules.files.atomic import atomic_write, recover
from malleable.datamodules.files.fetch import cache_folder, gguf_errors, hub_errors, hub_snapshot, resolve_model, tokenizer_files
from malleable.datamodules.files.sealed import find_damage, is_intact, seal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

PAD, EOS, BOS = "<pad>", "</s>", "<s>"
METHOD = "byte-level BPE across words, titles weighted by their counts"
WORD_METHOD = "byte-level BPE within words"


def load_tokenizer(name: str, local_files_only: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer. If it has no padding token, its end-of-sequence token is used.

    Args:
        name: Hub id, local folder, GGUF file, or an alias of :data:`~malleable.datamodules.files.fetch.ALIASES`.
        local_files_only: Use the local cache for hub ids, without downloads; the environment variable ``HF_HUB_OFFLINE`` has the same effect.

    Raises:
        OSError: If it is not found, is gated, or cannot be downloaded.
    """
    from transformers import AutoTokenizer

    folder, gguf_file = resolve_model(name)
    if gguf_file is not None:
        folder = str(_converted(Path(folder) / gguf_file))
    elif Path(folder).parent == cache_folder() / "tokenizers" and (damage := find_damage(Path(folder))):
        raise OSError(f"the cached tokenizer {folder} {damage}; remove this folder, and repeat the command that created it")
    with hub_errors("tokenizer", name):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=local_files_only, trust_remote_code=False)
        tokenizer("a")  # damaged settings cause errors at the first text
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def train_tokenizer(titles: Sequence[str], vocab_size: int = 2048, counts: Sequence[int] | None = None, across_words: bool = True) -> Path:
    """Train a byte-level BPE tokenizer on titles and store it in the cache; equal arguments give the same folder.

    With tokens across words, popular titles become one or two tokens, and histories have half as many tokens. With tokens within words, the tokens
    are similar to those of pretrained models.

    Args:
        titles: Texts to train on.
        vocab_size: Number of tokens, including 256 bytes and 3 special tokens.
        counts: Number of occurrences of each title in the training histories; each title counts once more.
        across_words: Whether tokens may span several words.

    Returns:
        Folder in the Hugging Face format.

    Raises:
        ValueError: If ``vocab_size`` is too small for the bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, EOS, BOS]
    if vocab_size < 256 + len(special):
        raise ValueError(f"vocab_size must be >= {256 + len(special)} (every byte and {special}), got {vocab_size}")
    weighted = sorted(zip(titles, counts if counts is not None else [0] * len(titles), strict=True))
    folder = cache_folder() / "tokenizers" / f"bpe-{_digest([vocab_size, METHOD if across_words else WORD_METHOD, *weighted])}"
    if not _is_cached(folder):
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not across_words)
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
        bpe.train_from_iterator((title for title, count in weighted for _ in range(1 + count)), trainer)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, eos_token=EOS, bos_token=BOS)
        _save(tokenizer, folder)
    return folder


def largest_token_id(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> int:
    """Return the largest id among the tokens of texts, the end-of-sequence token and the padding token.

    A model may have fewer embeddings than its tokenizer has tokens, but it needs the embeddings of all ids up to this one.
    """
    special = [token for token in (tokenizer.eos_token_id, tokenizer.pad_token_id) if isinstance(token, int)]
    encoded = tokenizer(list(texts))["input_ids"] if texts else []
    return max([*special, *(max(ids) for ids in encoded if ids)], default=-1)


def fingerprint(name: str) -> str:
    """Return a hash of a tokenizer's local files, including chat templates, or of its hub id and revision."""
    folder, gguf_file = resolve_model(name)
    if gguf_file is not None:
        stat = (Path(folder) / gguf_file).stat()
        return _digest([gguf_file, str(stat.st_size), str(stat.st_mtime_ns)])
    files = tokenizer_files(Path(folder).expanduser())
    if not files:
        snapshot = hub_snapshot(folder)
        return _digest([name] if snapshot is None else [name, snapshot.name])
    return _digest([[place, hashlib.sha256(path.read_bytes()).hexdigest()] for path, place in files.items()])


def tokenizer_digest(name: str) -> str | None:
    """Return the SHA-256 of the rules, special tokens and chat template of a tokenizer; ``None``, with a warning, if it cannot be read.

    It is the same for a tokenizer and its copies, independent of names and formats of files.
    """
    content = _content(name)
    return content[0] if content is not None else None


def pack_tokenizer(name: str) -> dict[str, Any] | None:
    """Return the compressed files of a tokenizer as ``uint8`` tensors for a checkpoint; ``None``, with a warning, if it cannot be read."""
    content = _content(name)
    if content is None:
        return None
    digest, files = content
    return {"name": name, "digest": digest, "files": {file: torch.tensor(bytearray(data), dtype=torch.uint8) for file, data in files.items()}}


def unpack_tokenizer(packed: Mapping[str, Any]) -> Path:
    """Write a packed tokenizer to the cache folder, unless it is there, and return its folder.

    Raises:
        ValueError: If the tokenizer does not match the stored digest.
    """
    folder = cache_folder() / "tokenizers" / f"stored-{packed['digest'][:16]}"
    if _is_cached(folder):
        return folder
    with atomic_write(folder, keep=is_intact) as temporary:
        temporary.mkdir()
        for file, data in packed["files"].items():
            # File names of an untrusted checkpoint must not refer to other folders.
            (temporary / Path(file).name).write_bytes(zlib.decompress(data.numpy().tobytes()))
        if (found := tokenizer_digest(str(temporary))) != packed["digest"]:
            raise ValueError(
                f"the checkpoint's tokenizer is damaged: its digest is {str(found)[:12]}, expected {packed['digest'][:12]}; "
                "use another copy of the checkpoint"
            )
        seal(temporary)
    return folder


def _content(name: str) -> tuple[str, dict[str, bytes]] | None:
    """Return digest and compressed files of a tokenizer, cached until its files change; if its files were removed, return the cached ones."""
    try:
        _CONTENTS[name] = _read_content(name, fingerprint(name))
    except Exception as error:  # a broken tokenizer must not stop a checkpoint from being written
        if name in _CONTENTS:
            return _CONTENTS[name]
        log.warning("the tokenizer %r cannot be read, so it is neither stored nor compared: %s: %s", name, type(error).__name__, error)
        return None
    return _CONTENTS[name]


# Last content of each tokenizer that this process has read, because the cache folder may be deleted during a run.
_CONTENTS: dict[str, tuple[str, dict[str, bytes]]] = {}


def write_from_memory(name: str, folder: Path) -> bool:
    """Write the files of a tokenizer from memory, if this process has read it.

    Returns:
        Whether the tokenizer was in memory.
    """
    if name not in _CONTENTS:
        return False
    folder.mkdir(exist_ok=True)
    for file, data in _CONTENTS[name][1].items():
        (folder / file).write_bytes(zlib.decompress(data))
    return True


@lru_cache(maxsize=4)
def _read_content(name: str, fingerprint: str) -> tuple[str, dict[str, bytes]]:
    del fingerprint  # part of the key only
    tokenizer: Any
    try:
        tokenizer = load_tokenizer(name, local_files_only=True)  # the data module has usually downloaded it
    except OSError:
        tokenizer = load_tokenizer(name)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {path.name: zlib.compress(path.read_bytes()) for path in sorted(Path(folder).iterdir()) if path.is_file()}
    return rules_digest(tokenizer), files


def rules_digest(tokenizer: Any) -> str:
    """Return the SHA-256 of the rules, special tokens and chat template of a loaded tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    # Padding and truncation depend on the last call of the tokenizer.
    rules = {key: value for key, value in state.items() if backend is None or key not in ("padding", "truncation")}
    parts: list[Any] = [rules, [tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token, tokenizer.chat_template]]
    if backend is None:
        # The rules of slow tokenizers are Python code; only their options and the vocabulary can be hashed.
        options = {
            key: value
            for key, value in tokenizer.init_kwargs.items()
            if isinstance(value, (bool, int, float, str)) and not key.endswith("_token") and key not in _NAMES
        }
        parts.append([type(tokenizer).__name__, options])
    elif getattr(tokenizer, "split_special_tokens", False):
        parts.append("split_special_tokens")
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# Options of a tokenizer that do not affect the tokens of a text.
_NAMES = {"name_or_path", "vocab_file", "merges_file", "tokenizer_file", "spm_file", "tokenizer_class", "processor_class", "auto_map"}
_NAMES |= {"padding_side", "truncation_side", "model_max_length", "clean_up_tokenization_spaces", "backend", "is_local", "local_files_only"}


def _converted(gguf: Path) -> Path:
    """Convert the tokenizer of a GGUF file and cache it, because reading it takes seconds."""
    from transformers import AutoTokenizer

    folder = cache_folder() / "tokenizers" / f"gguf-{fingerprint(str(gguf))}"
    if not _is_cached(folder):
        with gguf_errors(gguf):
            tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name, trust_remote_code=False)
        _save(tokenizer, folder)
    return folder


def _is_cached(folder: Path) -> bool:
    """Return whether a complete tokenizer is in the cache; log a warning if it is damaged."""
    recover(folder)
    damage = find_damage(folder)
    if damage and folder.exists():
        log.warning("the cached tokenizer %s %s: creating it again", folder, damage)
    return damage is None


def _save(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer, unless another process has just saved the same one."""
    with atomic_write(folder, keep=is_intact) as temporary:
        tokenizer.save_pretrained(temporary)
        seal(temporary)
    log.info("saved a tokenizer of %d tokens to %s", len(tokenizer), folder)


def _digest(parts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()[:16]
