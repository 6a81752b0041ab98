"""Sources of preference data.

Files:
    base.py: Base class of sources, and the rows that they return; read this file to add a source.
    records.py: Conversion of records with prompts, answers or conversations to rows.
    files.py: Your own files: JSON lines, JSON, CSV, TSV, Parquet.
    hub.py: Data sets of the Hugging Face Hub, or folders that `datasets` reads.
    synthetic.py: Small synthetic questions with a right and a wrong answer.
"""
