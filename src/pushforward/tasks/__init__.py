"""What one does with a Pushforward: train, translate, edit, guide, evaluate."""
