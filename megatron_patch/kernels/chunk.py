"""Tokens that the fused loss projects at once (kernels/loss.py); apart, so that `plan` reads it without torch."""

# Small enough that a chunk's bf16 logits are 262 MB at a vocabulary of 32000, large enough that adding to the fp32
# gradient of the weight (read and written once a chunk) stays well below the time of the chunk's GEMMs.
CHUNK_TOKENS = 4096
