"""What `scripts/bench.py` is made of: what is measured, the clock, the floor, the reference, and the tables."""
