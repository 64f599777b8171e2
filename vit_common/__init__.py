"""Facts about Vision Transformers that no framework owns: config, parameters, pixels, files."""
