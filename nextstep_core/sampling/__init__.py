"""How one image token is sampled: settings, time grids, guidance, noise, solvers. Pure functions; knows no network."""
