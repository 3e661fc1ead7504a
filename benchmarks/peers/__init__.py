"""The same five models behind other servers, to hold ours against."""
