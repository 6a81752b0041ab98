"""FB15k-237, Freebase without the inverse relations that leak test answers in FB15k.

Origin: K. Toutanova and D. Chen, "Observed versus latent features for knowledge base and text inference", CVSC 2015; plain files from
https://github.com/villmow/datasets_knowledge_embedding. Data: Freebase, CC-BY.
"""

from __future__ import annotations

from malleable.datamodules.sources.graphs.published import DownloadedGraph


class FB15k237(DownloadedGraph):
    """FB15k-237: 14,541 entities, 237 relations, 272,115 / 17,535 / 20,466 triples; 9 and 28 of these have an entity that is not in training."""

    terms = "Freebase, CC-BY; cite Toutanova and Chen 2015"
    address = "https://raw.githubusercontent.com/villmow/datasets_knowledge_embedding/master/FB15k-237"
    checksums = (
        "61099230e4439f90885ca9767739e31e8e32f54736fa1c35952b27997bc7c08a",
        "749cbe9d923bac7b9354da5614ecfed2e0220256d442c3e04a6b303db1f273d9",
        "e2e35e8e6113de220140b6f44dc71a5207b0fc6872d575e874aefe13259b655b",
    )
