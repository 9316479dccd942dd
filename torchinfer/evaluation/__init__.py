"""What a weight scheme and a cache dtype cost: `torchinfer eval`, and a model of lm-evaluation-harness."""
