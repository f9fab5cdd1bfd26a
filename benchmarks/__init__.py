"""Measurements side by side with other tools. Not part of the package, not part of the tests."""
