"""Functions on tensors, independent of modules and the Trainer.

Files:
    language/: Log-probabilities, decoding and grounding of language models.
    graphs/: Score functions and relation patterns of graph embeddings.
    recommendation/: Sequence encoders, losses over items, counting baselines, and hashes of rows.
    editing/: Edits of language models.
    search/: Search in embeddings.
    keyed_random.py: Random numbers that depend on a key only.
    number_checks.py: Checks of the numbers in settings.
    dropout.py: Faster dropout on a CPU.
    precision.py: Full-precision computation under autocast and half precision.
    defaults.py: Default device and dtype of new tensors.
    ranks.py: Distribution of work over ranks.
    schedule.py: Learning-rate schedules.
"""
