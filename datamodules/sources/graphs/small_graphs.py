"""Nations, UMLS and Kinship: small graphs for tests and demonstrations.

Origin: C. Kemp, J. B. Tenenbaum, T. L. Griffiths, T. Yamada, N. Ueda, "Learning systems of concepts with an infinite relational model", AAAI
2006, from data of R. J. Rummel (nations), A. T. McCray (UMLS) and W. W. Denham (kinship); split by the PyKEEN project, whose wheel contains
the files (https://github.com/pykeen/pykeen, MIT). Columns: head, relation, tail.

Other copies of Nations and Kinship have the columns relation, head, tail: read them with ``Triples(path=..., columns="rht")``.
"""

from __future__ import annotations

from typing import ClassVar

from malleable.datamodules.sources.graphs.published import PackagedGraph


class Nations(PackagedGraph):
    """Nations: 14 states, 55 relations, 1,592 / 199 / 201 triples. For tests of code only: a random ranking has an MRR above 0.2."""

    terms = "MIT, within PyKEEN; Kemp et al. 2006"
    package: ClassVar[str] = "pykeen==1.11.1"
    folder = "pykeen/datasets/nations"
    checksums = (
        "0830fa9da8e5bba2ccdaa45b7bdc9130451ba66b09ff2708f35fccaf82473e57",
        "2b337a62e51a2f45c283eac98a70d21b7e0e102136be1539b2a52c652a7b0530",
        "3971085165b47b6aeaec68058c6d8d98b3005e929db81268410b95ae4db770ab",
    )


class UMLS(PackagedGraph):
    """UMLS: 135 kinds of medical concepts, 46 relations, 5,216 / 652 / 661 triples."""

    terms = "MIT, within PyKEEN; Kemp et al. 2006 from the UMLS semantic network"
    package: ClassVar[str] = "pykeen==1.11.1"
    folder = "pykeen/datasets/umls"
    checksums = (
        "873ef4925516b83e7f6f8cc02b4be51d848828710a7f65a956f0ac4a9e452f35",
        "025c98f8a4891e2a6582ec5b40ee0d904031edad9c52554522f4b7904820c98e",
        "a7eb529a3d2810fcc96341ccc97c625a5e202f8389673aa6bd317eeebbb79014",
    )


class Kinship(PackagedGraph):
    """Kinship: 104 members of the Alyawarra, 25 kinship terms, 8,544 / 1,068 / 1,074 triples."""

    terms = "MIT, within PyKEEN; Kemp et al. 2006"
    package: ClassVar[str] = "pykeen==1.11.1"
    folder = "pykeen/datasets/kinships"
    checksums = (
        "738612111a6acf0e39662bde24c7e72a4d1edf20931beea077da367dda689731",
        "c56f8630a583178b1e569f11a64aa535ae1ce0b0912d8b1e24716be2b37f04da",
        "05e5733265761d55be9c05bfaff5a8d0808df46f9c1e9d66cc3f2fe114e43d88",
    )
