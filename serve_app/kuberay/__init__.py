"""Kubernetes manifests: rendered from configs/gke.yaml, and checked without a cluster."""
