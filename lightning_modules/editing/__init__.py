"""Editing of facts in the weights of a language model, in PyTorch without Lightning.

The mathematics is in ``functional/editing``: the null space in ``null_space.py``, its threshold in ``null_space_threshold.py``.

Terms:
    fact token: Token of a prompt at which the fact is edited; by default, the last token of the subject.
    context: Text that precedes a prompt.
    projection: Last matrix of the MLP of a block, which edits change.
    key, value: Input and output of a projection at one token.
    residual stream: Output of a block.
    target vector: Residual stream at the fact token for which the model gives the new answer.

Files:
    editor.py: :class:`AlphaEditor`, which edits facts in batches.
    settings.py: Settings of edits.
    layout.py: Module names of blocks and MLP projections.
    prompts.py: Prompts as token ids, and the position of the fact token.
    statistics.py: Second moments of keys over text.
    targets.py: Target vectors of facts.
    suffix_forward.py: Forward passes over the tokens after a changed hidden state.
    partial_forward.py: Forward passes over some blocks of a model.
    fine_tune.py: Fine-tuning of the same matrices, a baseline.
    answers.py: Answers of a model to the prompts of facts.
    evaluation.py: Metrics of edits.
    known.py: Selection of facts that the model answers correctly before the edit.
    evaluation_mode.py: Context that restores the state of a model.
"""
