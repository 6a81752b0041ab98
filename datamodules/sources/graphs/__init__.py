"""Sources of knowledge graphs.

Files:
    base.py: Base class of sources, and numbering of labels; read this file to add a source.
    published.py: Base classes of published graphs: downloads, packages, checksums.
    wn18rr.py: WN18RR.
    fb15k237.py: FB15k-237.
    codex.py: CoDEx-S.
    yago310.py: YAGO3-10.
    small_graphs.py: Nations, UMLS and Kinship.
    triples.py: Triples of users: a folder of splits, or one file.
    synthetic.py: Small synthetic graph.
"""
