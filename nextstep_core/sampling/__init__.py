"""How one image token is drawn: time grids, guidance, noise and solvers. Pure functions; knows no network."""
