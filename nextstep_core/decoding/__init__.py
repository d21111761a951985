"""A job to image tokens: prefill, the loop, and the engine that owns what they need."""
