"""Benchmarks: one question per file, with the contestants side by side in one run."""
