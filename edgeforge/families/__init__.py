"""Model families: one file per ``model_type``, from a configuration to a `ModelSpec`."""
