"""Sources of knowledge graphs.

Files:
    base.py: Base class of sources, and numbering of labels; read this file to add a source.
    published.py: WN18RR, FB15k-237, CoDEx-S, YAGO3-10, Nations, UMLS and Kinship, with one table of their URLs, checksums and terms.
    triples.py: Your own triples: a folder with one file for each split, or one file.
    synthetic.py: Small synthetic graph.
"""
