"""One file a model family, named after the `model_type` of its checkpoints."""
