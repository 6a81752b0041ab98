"""Tokenizers, chat templates and texts.

Files:
    tokenizer.py: Loading, training, digests and storage of tokenizers.
    chat.py: Prompts in the chat template of a tokenizer.
    texts.py: Reader of files with texts.
    packing.py: Packing of documents into rows of fixed length, and the dataset of such rows.
    text_rows.py: Dataset of packed texts.
"""
