"""Training at the speed of the hardware: the same sums in fewer passes over memory.

Each file here computes what a model's own code or a delta's port says, to rounding, with a backward
of its own that keeps less and reads less. Nothing here knows a model or a method: a module is taken
over only after a trial showed that it computes the formula. `esp.plain_paths()` turns all of it
off; what `torch.compile` traces takes attention alone from here, a compiler fuses the rest. In
evaluation low-rank changes alone are computed here, of a whole batch (decoding.py) or of rows on
different adapters (grouped.py).
"""
