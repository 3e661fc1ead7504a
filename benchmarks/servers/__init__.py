"""Real servers on loopback, with faults and counters, for tests and measurements."""
