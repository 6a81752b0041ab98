"""Editing of facts in the weights of a language model, in PyTorch without Lightning.

- ``editor.py``: :class:`AlphaEditor`, which edits facts in batches.
- ``settings.py``: Settings of edits.
- ``layout.py``: Module names of blocks and MLP projections.
- ``prompts.py``: Prompts as token ids, and the position of the fact token.
- ``statistics.py``: Second moments of keys over text. Their null space is in ``functional/editing/null_space.py``, and its threshold in
  ``functional/editing/null_space_threshold.py``.
- ``targets.py``: Target vectors of facts.
- ``suffix_forward.py``, ``partial_forward.py``: Forward passes over parts of a model or of its input.
- ``fine_tune.py``: Fine-tuning of the same matrices, a baseline.
- ``answers.py``, ``evaluation.py``: Evaluation of edits.
- ``known.py``: Selection of facts that the model answers correctly before the edit.
- ``evaluation_mode.py``: Context that restores the state of a model.
"""
