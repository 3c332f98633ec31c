"""What commands share: their options, models, checks, batches and reports."""
