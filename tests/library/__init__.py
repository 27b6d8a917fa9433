"""Tests of the library, in rooms as the library is."""
