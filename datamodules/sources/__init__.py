"""Sources of data: one folder for each domain, one file for each source or format.

Files:
    recommendation/: Interactions of users with items.
    graphs/: Triples of knowledge graphs.
    editing/: Facts, edit requests and texts.
"""
