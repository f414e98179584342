"""Where events go: files, figures, TensorBoard."""
