"""Measurements of one thing each, which say where the time of a picture goes; `python -m benchmarks.probes --help`."""
