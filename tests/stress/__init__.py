"""Whether what is promised holds when things are killed, interrupted, starved and repeated; see docs/reliability.md."""
