"""A small byte-level MoE language model: the example of how the runtime is used.

Importing this package, `config`, `model`, `checkpoint`, `corpus` or `train` needs neither the
native module nor the rest of `ep_runtime`; `parallel` and `decode` use the whole stack.
"""
