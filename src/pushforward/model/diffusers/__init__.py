"""Models of Hugging Face diffusers, read from their folders."""
