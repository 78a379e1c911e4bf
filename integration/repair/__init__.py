"""What a repaired 4-bit base is worth before any training, beside a low-rank start of the same error."""
