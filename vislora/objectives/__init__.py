"""What is optimised: a batch in, a loss per sample out; and what to validate."""
