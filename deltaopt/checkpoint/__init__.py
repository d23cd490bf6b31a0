"""Checkpoints: the optimizer's state as plain data, whole files, and what loading does to each W."""
