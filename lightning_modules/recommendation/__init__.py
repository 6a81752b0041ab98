"""Recommenders.

Files:
    sft.py: Supervised fine-tuning of a language model (SFT).
    dpo.py: Direct preference optimisation (DPO).
    alpha_dpo.py: Preference optimisation with an adaptive margin (AlphaDPO).
    sprec.py: Self-play preference optimisation (SPRec).
    sequential.py: Sequential recommender (SequentialRecommender): SASRec, GRU4Rec, BERT4Rec, HSTU.
    sequence_settings.py: Settings of its encoder.
    sequence_inputs.py: Inputs of encoders from batches, hidden items and negatives.
    ease.py: Linear autoencoder in closed form (EASE).
    baselines.py: Counting baselines: Popularity, ItemKNN, Markov.
    counted_rows.py: Rows that counting baselines read.
    generated_negatives.py: Rejected answers that a language model generates.
    evaluation.py: Allowed items, and metrics and evaluation of recommended lists.
"""
