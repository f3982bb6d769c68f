"""postformer: a laboratory for what comes after the Transformer."""
