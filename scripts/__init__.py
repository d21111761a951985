"""Programs around the pack: demo, evaluation and the training of the shipped checkpoint."""
