"""Tests of the loss vector."""
