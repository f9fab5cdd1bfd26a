"""Profiles fitted to the machine at hand: generated chains of operators, timed, and turned into kernels."""
