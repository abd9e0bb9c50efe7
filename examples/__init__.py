"""Worked examples; run them from the checkout, for example `python -m examples.experts.batched`."""
