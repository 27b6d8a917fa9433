"""Tests of the SDE."""
