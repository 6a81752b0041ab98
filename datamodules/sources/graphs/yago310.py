"""YAGO3-10, entities of YAGO3 with at least ten relations each.

Origin: F. Mahdisoltani, J. Biega, F. M. Suchanek, "YAGO3: A Knowledge Base from Multilingual Wikipedias", CIDR 2015; split by T. Dettmers et
al., AAAI 2018 (https://github.com/TimDettmers/ConvE); plain files from https://github.com/DeepGraphLearning/KnowledgeGraphEmbedding. Data:
YAGO, CC-BY. Its relations ``isAffiliatedTo`` and ``playsFor`` have mostly the same pairs.
"""

from __future__ import annotations

from malleable.datamodules.sources.graphs.published import DownloadedGraph


class YAGO310(DownloadedGraph):
    """YAGO3-10: 123,182 entities, 37 relations, 1,079,040 / 5,000 / 5,000 triples."""

    terms = "YAGO, CC-BY; cite Mahdisoltani et al. 2015 and Dettmers et al. 2018"
    address = "https://raw.githubusercontent.com/DeepGraphLearning/KnowledgeGraphEmbedding/2e440e0f9c687314d5ff67ead68ce985dc446e3a/data/YAGO3-10"
    checksums = (
        "afb9b51c68d1c997e85655477045b4c5146cd2a6b50b6eea5373383f35dcb12a",
        "c9018b77ec77e99f8d48bc3258d404f10b2049a6c7b4ac6eb663697e799dc6f5",
        "003887ca8a34c90fcaf9b0250b1c30a4b5f617f80f8cf0aeab9723333061598a",
    )
