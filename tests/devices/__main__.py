"""Run the tests of all rows and write docs/devices.md: `python -m tests.devices`. `--unproved` writes it at once."""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from tests.devices.page import PAGE, TESTS, named_tests, rendered


def main() -> None:
    if "--unproved" not in sys.argv[1:]:
        code = pytest.main(["-q", "-n", "0", *(str(TESTS / test) for test in named_tests())])
        if code != 0:
            sys.exit(f"{PAGE} is not written: not all of the tests that it names pass")
    PAGE.write_text(rendered(), "utf8")
    print(f"{PAGE} written", file=sys.stderr)


main()
