"""Writing checkpoints: an unquantized one becomes a quantized one, shard by shard."""
