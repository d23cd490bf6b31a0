"""Make a model folder of a GGUF file: ``python -m benchmarks.evidence.from_gguf FILE FOLDER``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or 2 for a call that cannot be taken."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence.from_gguf", description="Unpack a GGUF file.")
    parser.add_argument("file", type=Path, help="the GGUF file of a decoder")
    parser.add_argument("folder", type=Path, help="folder to write, with weights in float32")
    options = parser.parse_args(arguments)
    if not options.file.is_file():
        parser.error(f"{options.file} is no file")
    if find_spec("gguf") is None:
        parser.error("reading GGUF files takes the package gguf: pip install gguf")
    unpack(options.file, options.folder)
    return 0


def unpack(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file, with its rounded weights as float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    plain = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **plain)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    model.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
