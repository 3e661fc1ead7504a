"""Images: what a model does. Serves no HTTP."""
