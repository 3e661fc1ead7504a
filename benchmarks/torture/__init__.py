"""The torture set: small odd files with the right result of each (`imagen torture`)."""
