"""From files to modules: the only room that reads weights."""
