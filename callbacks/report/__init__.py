"""The report of a run.

To add a plot or a table, return a :class:`Section` from the method ``report_sections`` of a callback or of the tested module.

Files:
    report.py: :class:`RunReport`, which collects the metrics and sections of a run and writes the page.
    page.py: :class:`Section`, and the Markdown page.
    plots.py: Functions that draw the plots.
    fonts.py: Fonts for labels in all scripts.
    exposure.py: Number of recommendations of each item.
    logged.py: Selection of newly logged metrics.
    metric_notes.py: Descriptions of the metrics, and which direction is better.
    row_recorder.py: Storage of the rank of the true answer of each test row, for comparisons of runs.
    baselines.py: Baselines beside the tested module.
    trained_baseline.py: Training of a sequential recommender as a baseline.
    comparison.py: Comparison with the model before self-play.
    round_curves.py: Curves of validation metrics over the rounds of self-play.
    embeddings.py: Sections on knowledge-graph embeddings.
"""
