"""Patches: reversible changes of the weights of a model, stored as files and in checkpoints.

Files:
    patch.py: :class:`Patch`, and the format of a patch folder: ``patch.json`` and ``deltas.safetensors``.
    manifest.py: Fields of ``patch.json``, and their checks.
    delta.py: Change of one tensor, dense or low-rank.
    stack.py: Patches of one model; applying and reverting them.
    conflicts.py: Conflicts between patches.
    storage.py: Checkpoints, model folders and adapter folders that contain patches.
    tensors.py: Names and hashes of tensors; reading and writing of safetensors files.
    copy_folder.py: Copies of folders of weights.
"""
