"""Images: what a model does. Knows nothing of HTTP."""
