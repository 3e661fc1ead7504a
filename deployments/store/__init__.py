"""The model store: from a source to a verified folder on this node."""
