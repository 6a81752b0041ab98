"""Embeddings of texts by a pretrained encoder.

Shapes: N texts, B texts of a batch, T tokens, d width.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from malleable.datamodules.files.atomic import atomic_write, recover
from malleable.datamodules.files.cache import hash_settings
from malleable.datamodules.files.escape import brief_repr
from malleable.datamodules.files.fetch import cache_folder, hub_errors, resolve_model
from malleable.datamodules.files.user_files import reading, system_problem
from malleable.lightning_modules.functional.number_checks import check_numbers
from malleable.lightning_modules.functional.precision import full_precision
from malleable.lightning_modules.functional.search.vector_space import unit_rows
from malleable.lightning_modules.patches.tensors import tensor_bytes
from malleable.lightning_modules.verified_file import load_verified, save_verified

log = logging.getLogger(__name__)

Pooling = Literal["mean", "cls"]
Dtype = Literal["float32", "bfloat16"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_TEXTS_AT_ONCE = 10_000  # texts tokenized in a call


class TextEncoder:
    """Pretrained encoder of texts.

    The model is loaded when it is first used. Embeddings are stored in a cache, in a file whose name depends on the weights, the settings and the
    tokens of the texts. Dropout and autocast are off.

    Args:
        name: Hub id or local folder of an encoder, or ``minilm``: all-MiniLM-L6-v2 (width 384) from its package on the package index.
        pooling: ``mean``: mean of the last hidden states of all tokens; ``cls``: that of the first token. Padding is not counted.
        normalize: Scale embeddings to length 1.
        max_length: Maximum number of tokens, including special ones; longer texts are cut. The limit of the model applies if it is lower.
        batch_size: Number of texts in a forward pass.
        device: Device of the model. Default: ``cuda`` if there is one, else ``cpu``.
        cache_dir: Folder of stored embeddings. Default: ``embeddings`` in the cache folder of this package.
        local_files_only: Use the local cache for hub ids, without downloads.
        dtype: ``float32``, or ``bfloat16``, in which accelerators are faster and embeddings less precise.

    Raises:
        ValueError: If a setting is not allowed.

    Source:
        Mean pooling: Reimers and Gurevych (2019), Sentence-BERT, arXiv:1908.10084, Section 3.
    """

    def __init__(
        self,
        name: str = "minilm",
        pooling: Pooling = "mean",
        normalize: bool = True,
        max_length: int = 256,
        batch_size: int = 64,
        device: torch.device | str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        dtype: Dtype = "float32",
    ) -> None:
        for setting, value, options in (("pooling", pooling, get_args(Pooling)), ("dtype", dtype, get_args(Dtype))):
            if value not in options:
                raise ValueError(f"{setting} must be one of {', '.join(options)}; got {value!r}")
        self.name, self.pooling, self.normalize, self.max_length, self.batch_size = name, pooling, normalize, max_length, batch_size
        check_numbers(self, at_least={"max_length": 1, "batch_size": 1})
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self.local_files_only, self.dtype = local_files_only, dtype
        self._loaded: tuple[Any, Any] | None = None
        self._weights = ""

    @property
    def width(self) -> int:
        """Width of embeddings, d."""
        return int(self._load()[0].config.hidden_size)

    def encode(self, texts: Sequence[str], use_cache: bool = True) -> Tensor:
        """Return the embeddings of texts.

        Args:
            texts: The texts.
            use_cache: Read stored embeddings and store new ones.

        Returns:
            ``(N, d)`` float32 on the CPU; ``(0, d)`` without texts. If they cannot be stored, a warning is logged.

        Raises:
            OSError: If the model is not found or cannot be downloaded.
            ValueError: If a text is empty, or ``texts`` is a single text; if the model is not an encoder or lacks weights.
        """
        if isinstance(texts, str):
            raise ValueError(f"texts must be a list of texts, got the text {brief_repr(texts)}; give [text]")
        for position, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                problem = "is empty" if isinstance(text, str) else f"is {brief_repr(text)}, not a string"
                raise ValueError(f"text {position} {problem} and cannot be embedded; leave it out")
        if not len(texts):
            return torch.empty(0, self.width)
        tokens = self._tokenize(texts)
        if not use_cache:
            return self._encode(tokens)
        path = (self.cache_dir or cache_folder() / "embeddings") / f"{self._key(tokens)}.safetensors"
        stored = _read(path, (len(texts), self.width))
        if stored is None:
            stored = self._encode(tokens)
            try:
                with atomic_write(path) as temporary:
                    save_verified({"embeddings": stored}, temporary)
            except OSError as error:  # the embeddings are not lost with the cache
                log.warning("the embeddings cannot be stored as %s (%s); give another cache_dir", path, system_problem(error) or error)
        return stored

    def _load(self) -> tuple[Any, Any]:
        """Return the model and the tokenizer."""
        if self._loaded is None:
            from transformers import AutoConfig, AutoModel, AutoTokenizer

            folder, gguf = resolve_model(self.name)
            if gguf is not None:
                raise ValueError(f"{self.name!r} is a GGUF file; give the hub id or the folder of an encoder")
            source: dict[str, Any] = {"local_files_only": self.local_files_only, "trust_remote_code": False}
            local = reading(folder) if Path(folder).is_dir() else nullcontext()  # errors of the hub must not be reported as damaged files
            with hub_errors("tokenizer", self.name), local:
                tokenizer = AutoTokenizer.from_pretrained(folder, **source)
                tokenizer("a")  # damaged settings cause errors at the first text
            local = reading(folder) if Path(folder).is_dir() else nullcontext()
            with hub_errors("model", self.name), local:
                config = AutoConfig.from_pretrained(folder, **source)
                if config.is_encoder_decoder or not isinstance(getattr(config, "hidden_size", None), int):
                    raise ValueError(f"{self.name!r} ({config.model_type}) is not an encoder of texts; give one such as BERT or MPNet")
                model, info = AutoModel.from_pretrained(folder, config=config, dtype=DTYPES[self.dtype], output_loading_info=True, **source)
            # Checkpoints of masked language models have no pooler, which is not used.
            if missing := sorted(key for key in info["missing_keys"] if "pooler." not in key):
                raise ValueError(
                    f"{len(missing)} weights of {type(model).__name__} are missing in {self.name!r}, such as {missing[0]!r}; give a complete model"
                )
            self._loaded = model.to(self.device).eval().requires_grad_(False), tokenizer
            self._weights = _hash_weights(model)
        return self._loaded

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, with special tokens."""
        model, tokenizer = self._load()
        positions = getattr(model.config, "max_position_embeddings", None)
        limit = min(self.max_length, tokenizer.model_max_length, positions if isinstance(positions, int) and positions > 0 else self.max_length)
        tokens: list[list[int]] = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            part = list(texts[start : start + _TEXTS_AT_ONCE])
            tokens += tokenizer(part, truncation=True, max_length=limit, return_attention_mask=False)["input_ids"]
        empty = next((position for position, ids in enumerate(tokens) if not ids), None)
        if empty is not None:
            raise ValueError(f"text {empty} has no tokens and cannot be embedded; leave it out")
        return tokens

    def _key(self, tokens: list[list[int]]) -> str:
        """Return the name of the stored embeddings."""
        digest = hashlib.sha256()
        for ids in tokens:
            digest.update(len(ids).to_bytes(4, "little") + torch.tensor(ids, dtype=torch.int32).numpy().tobytes())
        settings = {"weights": self._weights, "dtype": self.dtype, "pooling": self.pooling, "normalize": self.normalize, "texts": digest.hexdigest()}
        return hash_settings(settings)

    @full_precision
    @torch.no_grad()
    def _encode(self, tokens: list[list[int]]) -> Tensor:
        """Return the embeddings ``(N, d)`` of texts, given by their tokens."""
        model, tokenizer = self._load()
        order = torch.tensor([len(ids) for ids in tokens]).argsort(stable=True, descending=True)  # similar lengths need little padding
        parts = []
        for index in torch.split(order, self.batch_size):
            rows = [torch.tensor(tokens[position]) for position in index.tolist()]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id or 0)
            mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
            ids, mask = ids.to(self.device), mask.to(self.device)
            states = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
            parts.append(pool(states, mask, self.pooling))
        embeddings = torch.cat(parts)
        return (unit_rows(embeddings) if self.normalize else embeddings).cpu()[order.argsort()]


def pool(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Return the mean of the states of real tokens, or the state of the first token, ``(B, d)`` float32.

    Args:
        states: ``(B, T, d)`` hidden states of rows padded on the right.
        mask: ``(B, T)`` bool, True on real tokens.
        pooling: ``mean`` or ``cls``.
    """
    if pooling == "cls":
        return states[:, 0].float()
    # Padding is left out rather than multiplied by 0, because its states may not be finite.
    total = states.float().masked_fill(~mask[..., None], 0).sum(1)
    return total / mask.sum(1, keepdim=True)


def _hash_weights(model: torch.nn.Module) -> str:
    """Return the hash of the class, the settings and all weights of a model."""
    config: Any = model.config
    kept = {key: value for key, value in config.to_dict().items() if not key.startswith("_") and key not in ("transformers_version", "architectures")}
    digest = hashlib.sha256(f"{type(model).__name__} {hash_settings(kept)}".encode())
    for name, value in sorted(model.state_dict().items()):
        if "pooler." not in name:
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(tensor_bytes(value.cpu()))
    return digest.hexdigest()


def _read(path: Path, shape: tuple[int, int]) -> Tensor | None:
    """Return stored embeddings; ``None`` if there are none, with a warning if they are damaged."""
    recover(path)
    if not path.exists():
        return None
    try:
        embeddings = load_verified(path)[0]["embeddings"]
        if embeddings.dtype == torch.float32 and tuple(embeddings.shape) == shape:
            return embeddings
        problem = f"{path} has embeddings of shape {tuple(embeddings.shape)}, expected {shape}"
    except (OSError, ValueError, KeyError) as error:
        problem = str(error)
    log.warning("%s: computing the embeddings again", problem)
    return None
