"""Knowledge-graph data: triples, queries, and the data module.

Files:
    datamodule.py: KnowledgeGraphDataModule: datasets of training, validation, test and prediction.
    store.py: Cache of the prepared graph.
    queries.py: Datasets of queries, and the known answers of all queries.
    report.py: Statistics of a graph, and warnings about relations that leak test answers.
    triple_files.py: Readers of files with triples and ids.
    labels.py: Readers of files with labels: queries of prediction, types and descriptions of entities.
"""
