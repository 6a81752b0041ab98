"""Losses as modules on tensors, independent of models, tokenizers and the Trainer.

Files:
    preference.py: Preference losses: Sigmoid (DPO), IPO, Hinge, Robust, SDPO, DMPO.
    ranking.py: Losses over items: CE, SampledCE, GBCE, BCE, BPR.
    embedding.py: Losses, negative sampling and regularisers of knowledge-graph embeddings.
"""
