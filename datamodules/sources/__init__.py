"""Sources of data: one folder for each domain, one file for each source or format.

Files:
    recommendation/: Interactions of users with items.
    graphs/: Triples of knowledge graphs.
    editing/: Facts, edit requests and texts.
    preference/: Prompts with chosen and rejected answers.
    hub_datasets.py: Data sets of the Hugging Face Hub.
"""
