"""How one image token is drawn: settings, time grids, guidance, noise and solvers. Pure functions; knows no network."""
