"""Recommendation data: interactions of users with items, rows, and the data module.

Files:
    datamodule.py: RecommendationDataModule: datasets of training, validation, test and prediction.
    store.py: Cache of the prepared data, and the settings that name it.
    splits.py: Settings of filters and split (Split); from interactions to rows.
    events.py: Table of all interactions with known items.
    titles.py: Cleaning and merging of titles.
    alignment.py: Alignment of new data with the catalogue of a checkpoint.
    prompt.py: Prompt templates, and tokens of prompts and answers.
    rows.py: Dataset of prompts with their answers.
    packed_rows.py: Dataset of packed histories.
    sequence_rows.py: Datasets of items for sequence models.
    histories.py: Readers of the files of prediction: histories and users.
    summary.py: Summary of the data in the log and the report.
"""
