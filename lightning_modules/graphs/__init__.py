"""Knowledge-graph embeddings.

Files:
    knowledge_graph.py: Base class: tables, training, ranking and prediction.
    nfe.py: Embeddings by normalizing flows (NFE).
    point_embeddings.py: TransE, DistMult, ComplEx and RotatE.
    answers.py: Queries by label: scores, best answers, relation patterns, export.
    settings.py: Settings of initialisation, optimizer and ranking.
"""
