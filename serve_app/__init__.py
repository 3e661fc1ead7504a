"""HTTP: what a client sees. Imports `deployments`, never the reverse."""
