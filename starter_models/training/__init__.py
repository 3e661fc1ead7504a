"""Training recipes of the starter models: data, one module per network, measured quality."""
