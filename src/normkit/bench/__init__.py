"""Timings that can be believed: cases with reasons, parity before any number, interleaved samples, paired ratios.

``cases`` says what is timed and why, ``peers`` who runs it, ``parity`` whether the answer is right, ``clock`` how long
it took, ``spread`` what the samples say, ``cell`` puts one line of it into a record, ``run`` starts a fresh process per
allocator. ``models`` are whole training steps; ``overhead`` is the fixed cost of a call; ``synchronized`` is what
statistics over several processes cost.
"""
