"""Language models: configuration, weights, training, decoding, checkpoints and exports.

Files:
    language_model.py: Base class of language-model methods.
    causal_lm.py: Language model of text (CausalLM).
    config.py: Configuration and construction of models; dropout; fingerprint of base weights.
    loading.py: Loading of pretrained weights.
    adapters.py: LoRA adapters.
    tuning.py: Settings of optimizer and scheduler.
    precision.py: Check of the training precision.
    compiled.py: Compilation of the decoder.
    limits.py: Checks for unsupported combinations of models and strategies.
    preference.py: Training step of preference methods.
    item_decoding.py: Decoding of items: recommendations and negatives.
    free_answers.py: Free-text answers, and the nearest titles.
    model_settings.py: Settings of a model that a checkpoint must match.
    checkpoints.py: Weights in checkpoints, and checks of the base model.
    export.py: Export to folders for transformers, PEFT and vLLM.
"""
