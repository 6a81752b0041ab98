"""Sources of knowledge graphs.

Files:
    base.py: Base class of sources, and numbering of labels; read this file to add a source.
    published.py: WN18RR, FB15k-237, CoDEx-S, YAGO3-10, Nations, UMLS and Kinship, with one table of their URLs, checksums and terms.
    triples.py: Triples of users: a folder of splits, or one file.
    synthetic.py: Small synthetic graph.
"""
