"""The quickstart: a real model adapted to real text, offline, with figures that can be trusted.

    encoder.py   MiniLM and docstrings by subject: head only, LoRA and full tuning compared
    decoder.py   Espalier's own decoder: function signature → first line of its docstring

Each training is an `espalier train` of its own, with its config kept: what a person sees here is
what the same command does with their data, and peak memory is that of a process of its own.
"""
