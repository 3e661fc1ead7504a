"""Small trained models that ship with Imagen, and the code that trained them."""
