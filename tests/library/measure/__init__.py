"""Tests of measurements of gradient noise."""
