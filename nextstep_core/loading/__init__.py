"""From names and files to modules: the only room that reads weights or uses the network."""
