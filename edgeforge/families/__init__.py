"""Model families: one file for each, named after the `model_type` of its checkpoints."""
