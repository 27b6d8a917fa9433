"""Tests of the library, in the folders that the library has."""
