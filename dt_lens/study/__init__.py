"""Pipelines over everything below: scan a model, choose edits, measure them, report."""
