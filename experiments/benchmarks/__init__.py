"""Benchmarks against PyTorch and its fault injectors; each writes what it measured."""
