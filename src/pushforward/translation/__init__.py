"""From one model, or one text, to another: translation and editing."""
