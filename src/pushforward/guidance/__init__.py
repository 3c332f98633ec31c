"""Codes by what their images should be: energies, chains over codes, optimisers, steering, inpainting."""
