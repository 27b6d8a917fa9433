"""Benchmarks: one question a file, contestants side by side in one run."""
