"""Losses as modules on tensors, independent of models, tokenizers and the Trainer.

Files:
    preference_base.py: Base classes of preference losses.
    preference.py: Preference losses of pairs (Sigmoid, RDPO, CPO, ORPO, Robust, ExoPair, IPO, Hinge, Discopop) and of lists (SoftmaxDPO, DMPO).
    adaptive_margin.py: Preference losses with a target margin: AdaptiveMargin (alpha-DPO), SimPO.
    answer_losses.py: Preference losses with a term for each answer: NCAPair, APOZero, APODown, SPPO, BCOPair; of unpaired rows: KTO.
    running_statistics.py: Moving averages of statistics of training rows.
    ranking.py: Losses over items: CE, SampledCE, GBCE, BCE, BPR.
    embedding.py: Losses, negative sampling and regularisers of knowledge-graph embeddings.
"""
