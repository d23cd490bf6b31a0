"""Measurements and demonstrations, each run as a module from the root of the repository."""
