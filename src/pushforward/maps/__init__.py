"""Maps from Gaussian codes to images, their codes, and codes on disk."""
