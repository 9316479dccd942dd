"""`torchinfer plan`: which accelerator a model fits, how fast it may be there at best, and what that costs."""
