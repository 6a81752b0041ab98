"""Mathematics and text statistics of model editing.

A key is the input of an edited weight matrix at one token, and a value is its output there.

Files:
    second_moments.py: Second moments of keys, and their eigenvalues.
    null_space_threshold.py: Selection of the directions that edits may change.
    null_space.py: Projection of keys onto these directions.
    weight_update.py: Closed-form update of a matrix, and the penalties of AlphaEdit, MEMIT and ridge.
    answer_match.py: Match of a generated text with an expected answer.
    word_statistics.py: n-gram entropy and TF-IDF.
"""
