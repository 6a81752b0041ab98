"""Callbacks. ``__init__.pyi`` lists the public names, which are imported on first use.

Files:
    editing/: Edits after training, and their evaluation.
    report/: The report of a run.
    self_play/: The self-play loop.
    answer_samples.py: Sampled answers during preference tuning.
    reference.py: Cache of reference log-probabilities.
    predictions.py: Writing of predictions to files.
    vectors.py: Export of the vectors of users and items.
    last_checkpoint.py: Checkpoint of the last epoch, and handling of signals.
    line_progress.py: Progress output.
    restart.py: Corrections of how Lightning resumes a run.
    row_pass.py: Passes over rows outside the loops of the Trainer.
    run_files.py: Paths of files in run folders.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
