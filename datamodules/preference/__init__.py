"""Preference data of any language model: prompts with chosen and rejected answers, and the data module.

Files:
    datamodule.py: PreferenceDataModule: datasets of training, validation, test and prediction.
    store.py: Cache of tokenised rows.
    tokenize.py: Chat templates, joint tokenisation of prompts and answers, and truncation.
    split.py: Split by prompt, and answers of other rows for unpaired rows.
    rows.py: Datasets of rows, and of prompts to answer.
    prompts.py: Reader of files with prompts to answer.
    lengths.py: Statistics of lengths, for the summary of the data.
"""
