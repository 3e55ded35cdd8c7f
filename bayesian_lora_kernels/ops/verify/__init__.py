"""Whether an implementation is right on this machine: found out before its first result is used, and remembered.

``problem``: what must be solved, and how results are compared. ``judge``: solves it in this process. ``worker``: does
so in a process of its own, since a kernel may crash or hang; ``process``: its other end. ``store``: the file that
remembers. ``machine``: what a result holds for. ``verifier``: what ``dispatch`` asks. Nothing here knows a kernel, and
only ``machine`` knows CUDA.
"""
