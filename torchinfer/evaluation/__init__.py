"""How good a model is under a weight scheme and a cache dtype: `torchinfer eval`, and a model of lm-evaluation-harness."""
