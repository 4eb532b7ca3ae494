"""Minari data in, decision-transformer checkpoint out."""
