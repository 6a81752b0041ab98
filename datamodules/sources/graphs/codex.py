"""CoDEx-S, a benchmark from Wikidata and Wikipedia.

Origin: https://github.com/tsafavi/codex (MIT; facts of Wikidata, CC0). Entities and relations are Wikidata's ids. Cite: T. Safavi and
D. Koutra, "CoDEx: A Comprehensive Knowledge Graph Completion Benchmark", EMNLP 2020.
"""

from __future__ import annotations

from malleable.datamodules.sources.graphs.published import DownloadedGraph


class CoDExS(DownloadedGraph):
    """CoDEx-S: 2,034 entities, 42 relations, 32,888 / 1,827 / 1,828 triples."""

    terms = "MIT, facts of Wikidata (CC0); cite Safavi and Koutra 2020"
    address = "https://raw.githubusercontent.com/tsafavi/codex/3132e426c2a6b643b70bad679905a3a6270be440/data/triples/codex-s"
    checksums = (
        "64f93b7f314f3936a6f65739721429db3f6a7c8f5a1e1104ec3bb544f7434f59",
        "3831c0e57daef03c3a18cdd1a72e370b496f696c5218883d35c7d2ab8a6a772c",
        "27127fcb34688c4778e88a39ef3c9b540807da846021e9d9685660ac1838aca1",
    )
