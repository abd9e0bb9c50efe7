"""A mixture-of-experts layer over the runtime, once for each receive format.

batched     masked grouped GEMM over [experts, rows, H]
contiguous  grouped GEMM over rows sorted by expert, experts aligned to tiles
compact     gather-style fused MoE over one row per message, weights applied by the experts

Experts are SwiGLU with BF16 weights; rows arrive as BF16 or as FP8 with a scale per 128 channels.
Received rows are multiplied where dispatch put them, and the result is written where combine reads
it: the runtime copies nothing for its consumers. docs/examples.md says which of them wants what.
"""
