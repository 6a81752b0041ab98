"""The report of a run.

To add a plot or a table, return a :class:`Section` from the method ``report_sections`` of a callback or of the tested module.

Files:
    report.py: :class:`RunReport`, which collects the metrics and sections of a run and writes the page.
    page.py: :class:`Section`, and the Markdown page.
    plots.py: Functions that draw the plots.
    fonts.py: Fonts for labels in all scripts.
    exposure.py: Exposure of items and genres.
    logged.py: Metrics that were logged during the run.
    metric_notes.py: Descriptions of the metrics, and which direction is better.
    row_recorder.py: Storage of the metrics of each test row, for comparisons.
    baselines.py: Counting baselines beside the tested module.
    comparison.py: Comparison with the model before self-play.
    embeddings.py: Sections on knowledge-graph embeddings.
"""
