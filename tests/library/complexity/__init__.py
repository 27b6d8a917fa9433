"""Tests of local complexities."""
