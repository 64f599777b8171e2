"""The file formats weights come in: one module a format, each `DataFile -> {name: Tensor}`."""
