"""How good samplers, models and translations are."""
