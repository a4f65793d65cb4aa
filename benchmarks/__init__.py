"""The ring against what it replaces, both sides alternating in one run. ``python -m benchmarks`` runs them all."""
