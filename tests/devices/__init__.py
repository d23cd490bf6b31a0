"""What is said of several devices, row by row, with the tests that prove it: `docs/devices.md` is written from it."""
