"""Sources of recommendation data.

Files:
    base.py: Base class of sources, and the tables that they return; read this file to add a source.
    movielens.py: MovieLens 100K and 1M.
    tables.py: Your own tables of interactions and items: CSV, TSV, JSON lines, Parquet.
    columns.py: Conversion of the columns of tables to ids, times, ratings, titles and genres.
    hub_tables.py: Tables of interactions and items from the Hugging Face Hub, or from folders that `datasets` reads.
    instruction.py: Instruction rows with titles in quotes (SPRec, BIGRec).
    candidates.py: Rows with candidates (LLaRA, S-DPO).
    ready_rows.py: Helpers for data sets with a fixed split.
    synthetic.py: Small synthetic catalogue.
"""
