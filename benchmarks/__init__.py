"""Benchmarks: pytest benchmarks --benchmark-only; python -m benchmarks.report; .compare."""
