"""Adapters for inference engines, built on `Buffer` and `graphs`; nothing here needs them."""
