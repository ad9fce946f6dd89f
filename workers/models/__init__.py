"""Model families and their checkpoints: our packed transformer, and what each family calls its tensors."""
