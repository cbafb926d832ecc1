"""The GPU benchmark: python -m benchmarks.device. Its own cases, ten minutes in all."""
