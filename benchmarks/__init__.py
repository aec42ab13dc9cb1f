"""Measurements, each a script that writes a readable table to benchmarks/results/."""
