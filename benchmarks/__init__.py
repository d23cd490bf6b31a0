"""Measurements and demonstrations, each run as a module from the root of the repository."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
"""Where results are that the tables of the documentation are made of."""
