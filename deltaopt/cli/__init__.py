"""The commands of `python -m deltaopt`, one file each: `add_arguments(parser)` and `run(arguments) -> Outcome`."""
