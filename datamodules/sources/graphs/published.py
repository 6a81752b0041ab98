"""Published graphs with fixed splits: one table of their files, and one source for each.

To add a graph, add its files to :data:`GRAPHS`, and a subclass of :class:`PublishedGraph`.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple

from malleable.datamodules.files.fetch import FetchError, fetch, fetch_package_files
from malleable.datamodules.graphs.triple_files import read_labels
from malleable.datamodules.sources.graphs.base import GraphSource, GraphTables, number
from malleable.datamodules.sources.graphs.triples import split_files

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
FILES = ("train.txt", "valid.txt", "test.txt")


class GraphFiles(NamedTuple):
    """Files of a published graph: ``train.txt``, ``valid.txt`` and ``test.txt``, with lines head, relation, tail.

    Attributes:
        terms: Terms of use, which are logged once.
        checksums: SHA-256 of the uncompressed files of training, validation and test.
        folder: URL of the folder with the files, or the folder inside ``package``.
        package: Package on the package index that contains the files. It is opened as an archive and never installed or imported.
    """

    terms: str
    checksums: tuple[str, str, str]
    folder: str
    package: str | None = None


_ROTATE = "https://raw.githubusercontent.com/DeepGraphLearning/KnowledgeGraphEmbedding/2e440e0f9c687314d5ff67ead68ce985dc446e3a/data"
_PYKEEN = "pykeen==1.11.1"

GRAPHS = {
    "WN18RR": GraphFiles(
        "WordNet licence (Princeton University); cite Dettmers et al. 2018",
        (
            "038612e783c215ee5f3ca9fbfca27b8d0739be1028fe4ee7c174aecf0b83d5df",
            "453ce7202afa58094a04d2b1560ee2b02660f1c260b32ce6651c8ccedd1028ab",
            "0383bceaaa1096cf3c03ec021ed0048068e2355dbfc0239b292cefdac821cec5",
        ),
        f"{_ROTATE}/wn18rr",
    ),
    "FB15k237": GraphFiles(
        "Freebase, CC-BY; cite Toutanova and Chen 2015",
        (
            "61099230e4439f90885ca9767739e31e8e32f54736fa1c35952b27997bc7c08a",
            "749cbe9d923bac7b9354da5614ecfed2e0220256d442c3e04a6b303db1f273d9",
            "e2e35e8e6113de220140b6f44dc71a5207b0fc6872d575e874aefe13259b655b",
        ),
        "https://raw.githubusercontent.com/villmow/datasets_knowledge_embedding/master/FB15k-237",
    ),
    "CoDExS": GraphFiles(
        "MIT, facts of Wikidata (CC0); cite Safavi and Koutra 2020",
        (
            "64f93b7f314f3936a6f65739721429db3f6a7c8f5a1e1104ec3bb544f7434f59",
            "3831c0e57daef03c3a18cdd1a72e370b496f696c5218883d35c7d2ab8a6a772c",
            "27127fcb34688c4778e88a39ef3c9b540807da846021e9d9685660ac1838aca1",
        ),
        "https://raw.githubusercontent.com/tsafavi/codex/3132e426c2a6b643b70bad679905a3a6270be440/data/triples/codex-s",
    ),
    "YAGO310": GraphFiles(
        "YAGO, CC-BY; cite Mahdisoltani et al. 2015 and Dettmers et al. 2018",
        (
            "afb9b51c68d1c997e85655477045b4c5146cd2a6b50b6eea5373383f35dcb12a",
            "c9018b77ec77e99f8d48bc3258d404f10b2049a6c7b4ac6eb663697e799dc6f5",
            "003887ca8a34c90fcaf9b0250b1c30a4b5f617f80f8cf0aeab9723333061598a",
        ),
        f"{_ROTATE}/YAGO3-10",
    ),
    "Nations": GraphFiles(
        "MIT, within PyKEEN; Kemp et al. 2006",
        (
            "0830fa9da8e5bba2ccdaa45b7bdc9130451ba66b09ff2708f35fccaf82473e57",
            "2b337a62e51a2f45c283eac98a70d21b7e0e102136be1539b2a52c652a7b0530",
            "3971085165b47b6aeaec68058c6d8d98b3005e929db81268410b95ae4db770ab",
        ),
        "pykeen/datasets/nations",
        _PYKEEN,
    ),
    "UMLS": GraphFiles(
        "MIT, within PyKEEN; Kemp et al. 2006 from the UMLS semantic network",
        (
            "873ef4925516b83e7f6f8cc02b4be51d848828710a7f65a956f0ac4a9e452f35",
            "025c98f8a4891e2a6582ec5b40ee0d904031edad9c52554522f4b7904820c98e",
            "a7eb529a3d2810fcc96341ccc97c625a5e202f8389673aa6bd317eeebbb79014",
        ),
        "pykeen/datasets/umls",
        _PYKEEN,
    ),
    "Kinship": GraphFiles(
        "MIT, within PyKEEN; Kemp et al. 2006",
        (
            "738612111a6acf0e39662bde24c7e72a4d1edf20931beea077da367dda689731",
            "c56f8630a583178b1e569f11a64aa535ae1ce0b0912d8b1e24716be2b37f04da",
            "05e5733265761d55be9c05bfaff5a8d0808df46f9c1e9d66cc3f2fe114e43d88",
        ),
        "pykeen/datasets/kinships",
        _PYKEEN,
    ),
}
"""Files of each graph by the name of its class."""


class PublishedGraph(GraphSource):
    """Base class of graphs with a fixed split, which are downloaded on first use.

    Subclasses state numbers of triples as training / validation / test.

    Args:
        path: Folder with ``train.txt``, ``valid.txt`` and ``test.txt`` (or ``.tsv``, ``.gz``) to read instead. There is a warning if the files differ
            from the published ones.

    Raises:
        FileNotFoundError: If a file is missing in ``path``.
        FetchError: If the files cannot be downloaded.
    """

    published: ClassVar[GraphFiles]
    """The published files."""

    def __init__(self, path: str | None = None) -> None:
        self.path = None if path is None else Path(path).expanduser()

    def fetched(self) -> list[Path]:
        """Return the files of training, validation and test in the cache, and download them if needed."""
        checksums = dict(zip(FILES, self.published.checksums, strict=True))
        folder, package = self.published.folder, self.published.package
        if package is not None:
            return fetch_package_files(package, {f"{folder}/{name}": sha256 for name, sha256 in checksums.items()})
        home = f"graphs/{type(self).__name__.lower()}"
        return [fetch(f"{folder}/{name}", sha256, f"{home}/{name}") for name, sha256 in checksums.items()]

    def files(self) -> list[Path]:
        """Return the files of the splits."""
        return list(self._splits().values())

    def load(self) -> GraphTables:
        """Read the triples."""
        return number({split: read_labels(path) for split, path in self._splits().items()})

    def _splits(self) -> Mapping[str, Path]:
        name = type(self).__name__
        _log_once(f"{name}: {self.published.terms}")
        if self.path is None:
            try:
                return dict(zip(SPLITS, self.fetched(), strict=True))
            except FetchError as error:
                raise FetchError(
                    f"{error}\nAlternatively, download train.txt, valid.txt and test.txt, and give their folder: {name}(path=FOLDER)"
                ) from error
        found = split_files(self.path)
        if missing := [split for split in SPLITS if split not in found]:
            raise FileNotFoundError(f"{self.path} has no file of the {missing[0]} split; {name} needs train.txt, valid.txt and test.txt")
        for split, expected in zip(SPLITS, self.published.checksums, strict=True):
            if _plain_sha256(found[split]) != expected:
                _warn_once(f"{found[split]} differs from the published {split} split of {name}: figures are not comparable with published ones")
        return found


class WN18RR(PublishedGraph):
    """WN18RR: 40,943 entities, 11 relations, 86,835 / 3,034 / 3,134 triples.

    210 validation and 210 test triples have an entity that is not in training. WordNet without the inverse relations that leak test answers in WN18.

    Source:
        Dettmers et al. (2018), Convolutional 2D Knowledge Graph Embeddings, AAAI; https://github.com/TimDettmers/ConvE; plain files from
        https://github.com/DeepGraphLearning/KnowledgeGraphEmbedding. Data: WordNet, Princeton University, under the WordNet licence.
    """

    published = GRAPHS["WN18RR"]


class FB15k237(PublishedGraph):
    """FB15k-237: 14,541 entities, 237 relations, 272,115 / 17,535 / 20,466 triples.

    9 validation and 28 test triples have an entity that is not in training. Freebase without the inverse relations that leak test answers in FB15k.

    Source:
        Toutanova and Chen (2015), Observed versus latent features for knowledge base and text inference, CVSC; plain files from
        https://github.com/villmow/datasets_knowledge_embedding. Data: Freebase (CC-BY).
    """

    published = GRAPHS["FB15k237"]


class CoDExS(PublishedGraph):
    """CoDEx-S, from Wikidata and Wikipedia: 2,034 entities, 42 relations, 32,888 / 1,827 / 1,828 triples.

    Source:
        Safavi and Koutra (2020), CoDEx: A Comprehensive Knowledge Graph Completion Benchmark, EMNLP; https://github.com/tsafavi/codex (MIT).
        Entities and relations are the ids of Wikidata (CC0).
    """

    published = GRAPHS["CoDExS"]


class YAGO310(PublishedGraph):
    """YAGO3-10: 123,182 entities, 37 relations, 1,079,040 / 5,000 / 5,000 triples.

    Entities of YAGO3 with at least ten relations each. The relations ``isAffiliatedTo`` and ``playsFor`` have mostly the same pairs.

    Source:
        Mahdisoltani, Biega, Suchanek (2015), YAGO3: A Knowledge Base from Multilingual Wikipedias, CIDR; split by Dettmers et al. (2018), AAAI;
        plain files from https://github.com/DeepGraphLearning/KnowledgeGraphEmbedding. Data: YAGO (CC-BY).
    """

    published = GRAPHS["YAGO310"]


class Nations(PublishedGraph):
    """Nations: 14 states, 55 relations, 1,592 / 199 / 201 triples. For tests of code only: a random ranking has an MRR above 0.2.

    Other copies have the columns relation, head, tail: read these with ``Triples(path=..., columns="rht")``.

    Source:
        Kemp et al. (2006), Learning systems of concepts with an infinite relational model, AAAI, from data of R. J. Rummel; split by the
        PyKEEN project, whose wheel contains the files (https://github.com/pykeen/pykeen, MIT).
    """

    published = GRAPHS["Nations"]


class UMLS(PublishedGraph):
    """UMLS: 135 kinds of medical concepts, 46 relations, 5,216 / 652 / 661 triples.

    Source:
        Kemp et al. (2006), Learning systems of concepts with an infinite relational model, AAAI, from data of A. T. McCray; split by the
        PyKEEN project, whose wheel contains the files (https://github.com/pykeen/pykeen, MIT).
    """

    published = GRAPHS["UMLS"]


class Kinship(PublishedGraph):
    """Kinship: 104 members of the Alyawarra, 25 kinship terms, 8,544 / 1,068 / 1,074 triples.

    Other copies have the columns relation, head, tail: read these with ``Triples(path=..., columns="rht")``.

    Source:
        Kemp et al. (2006), Learning systems of concepts with an infinite relational model, AAAI, from data of W. W. Denham; split by the
        PyKEEN project, whose wheel contains the files (https://github.com/pykeen/pykeen, MIT).
    """

    published = GRAPHS["Kinship"]


@functools.cache
def _log_once(text: str) -> None:
    log.info(text)


@functools.cache
def _warn_once(text: str) -> None:
    log.warning(text)


def _plain_sha256(path: Path) -> str:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
