"""The networks and their configuration: plain math on tensors. Knows no files, no prompts, no sampling."""
