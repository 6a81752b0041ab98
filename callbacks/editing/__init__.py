"""Edits after training, and their evaluation.

Files:
    post_fit.py: :class:`PostFitEdit`, the base class of edits.
    alpha_edit.py: :class:`AlphaEdit`.
    edit_evaluation.py: :class:`EditEvaluation`.
    edit_report.py: Tables and figures of edits in the report.
    patched_model.py: Base class of callbacks for models with patches.
"""
