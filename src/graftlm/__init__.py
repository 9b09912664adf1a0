"""Better language models out of the parameters they already have."""
