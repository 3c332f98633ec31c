"""What Pushforward gives to other libraries."""
