"""`make bench-peers`: the same five models behind other servers, to compare Imagen with."""
