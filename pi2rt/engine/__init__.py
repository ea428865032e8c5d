"""Sequences, scheduler, prefix reuse: the step loop."""
