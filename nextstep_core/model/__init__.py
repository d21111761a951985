"""The network: pure math on tensors. Knows no files, no prompts, no sampling."""
