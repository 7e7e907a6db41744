"""Where the numbers of a run go: `logger.py` is the interface, each other file one place.

log.jsonl is always written, and what cannot be written there ends the run. Everything else is drawn from it and ends
nothing: event files are given up where the disk refuses them, a service (Weights & Biases, MLflow) is fed by a process
of its own that reads log.jsonl, and that tries again while the service is away.
"""
