"""Growth from 1 to 1,000 GPUs: a simulation, and real replicas beside it (docs/growth.md)."""
