"""Score functions, losses and relation patterns of knowledge-graph embeddings.

Files:
    interaction.py: Base class of score functions as inner products.
    flows.py: Score functions of NFE.
    points.py: Score functions of TransE, DistMult, ComplEx and RotatE.
    squared_distance.py: Squared distances as inner products.
    one_vs_all.py: Cross-entropy over all entities, in chunks.
    relation_patterns.py: Symmetric, inverse and composed relations.
"""
