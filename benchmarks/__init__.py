"""What `python -m benchmarks` is made of: what is measured, the clock, the floor, the reference, and the tables."""
