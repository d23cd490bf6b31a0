"""The evidence: Delta-LoRA, what the paper compares it with, and the controls it lacked, each tuned and over seeds.

``python -m benchmarks.evidence run small`` trains a grid of runs, one result file a run; a call that was cut short is
continued by the next one. ``python -m benchmarks.evidence page`` builds the tables and pictures of docs/evidence.md
from the files alone. benchmarks/README.md says how.
"""
