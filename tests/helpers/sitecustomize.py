"""Python runs this at the start of every process of :mod:`launch`: a rank leaves its process group before the interpreter ends.

A thread of gloo that outlives the interpreter now and then aborts the process.
"""

import atexit
import sys


@atexit.register
def _leave_process_group() -> None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
