"""WN18RR, WordNet without the inverse relations that leak test answers in WN18.

Origin: T. Dettmers, P. Minervini, P. Stenetorp, S. Riedel, "Convolutional 2D Knowledge Graph Embeddings", AAAI 2018
(https://github.com/TimDettmers/ConvE); plain files from https://github.com/DeepGraphLearning/KnowledgeGraphEmbedding. Data: WordNet, Princeton
University, under the WordNet licence.
"""

from __future__ import annotations

from malleable.datamodules.sources.graphs.published import DownloadedGraph


class WN18RR(DownloadedGraph):
    """WN18RR: 40,943 entities, 11 relations, 86,835 / 3,034 / 3,134 triples; 210 and 210 of these have an entity that is not in training."""

    terms = "WordNet licence (Princeton University); cite Dettmers et al. 2018"
    address = "https://raw.githubusercontent.com/DeepGraphLearning/KnowledgeGraphEmbedding/2e440e0f9c687314d5ff67ead68ce985dc446e3a/data/wn18rr"
    checksums = (
        "038612e783c215ee5f3ca9fbfca27b8d0739be1028fe4ee7c174aecf0b83d5df",
        "453ce7202afa58094a04d2b1560ee2b02660f1c260b32ce6651c8ccedd1028ab",
        "0383bceaaa1096cf3c03ec021ed0048068e2355dbfc0239b292cefdac821cec5",
    )
