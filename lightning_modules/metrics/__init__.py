"""Metrics whose states are sums over distinct rows.

Files:
    ranking.py: HR, nDCG, MRR, recall, precision and MAP.
    exposure.py: Diversity and exposure of recommended lists.
    link_prediction.py: Filtered ranks of entities: MR, MRR, hits.
    editing.py: Metrics of edits, and perplexity.
    row_ranks.py: Ranks of individual rows.
    significance.py: Confidence intervals and tests of differences between runs.
"""
