"""Products in C for CPUs, compiled on the user's machine where it has a compiler, and tried like all others."""
