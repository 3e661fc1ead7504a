"""API keys and their limits. Knows no HTTP; `serve_app/authorization.py` asks for the key."""
