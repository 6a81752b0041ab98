"""Commands without a Trainer: ``compare``, ``patch`` and ``recipes``.

Files:
    compare.py: Test metrics of several runs side by side.
    reported_runs.py: Reader of the reports of runs.
    patch.py: Patches of stored weights.
    patch_text.py: Output of ``malleable patch``.
    recipes.py: List, print and copy recipes.
"""
