"""Adapters for inference engines. They build on `Buffer` and `graphs`; the package does without them."""
