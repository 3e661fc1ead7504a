"""One module per model family; each turns rows of pixels into rows of pixels."""
