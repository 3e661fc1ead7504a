"""The KServe V2 protocol over gRPC, by Ray Serve's gRPC proxy (docs/protocols.md, "gRPC").

kserve_pb2.py comes of kserve.proto by `make proto`.
"""
