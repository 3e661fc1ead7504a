"""Jobs: requests that outlive their client. Knows no HTTP; `protocols/jobs.py` has the routes."""
