"""Sweeps: each file's sweep() returns the runs of a scaling study, for scfm scaling run."""
