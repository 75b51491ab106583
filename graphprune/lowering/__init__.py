"""Rewrites that make a model visible to a tracer: opaque modules and graphs of other dialects."""
