"""`make bench-jobs`: what jobs cost, beside plain Celery.

__main__.py (rounds, tables)
→ bare.py (the queue without HTTP), kept.py (10,000 finished jobs)
    → alone.py (an Ingress and a worker without Ray, as processes)
→ through_serve.py (jobs over HTTP)
    → systems.py (the server) → baseline_app.py, celery_app.py (what is measured beside Imagen)
Both use clients.py (closed loops of HTTP requests).
"""
