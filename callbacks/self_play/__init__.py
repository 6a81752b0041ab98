"""The self-play loop.

Files:
    loop.py: :class:`SelfPlayLoop`.
    phases.py: Settings and order of the phases.
    limits.py: Limits on batches and steps that the loop supports.
    round_negatives.py: Rejected answers of a round.
    round_file.py: File with the rows, negatives and reference log-probabilities of a round.
"""
