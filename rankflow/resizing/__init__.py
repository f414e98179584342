"""Two ways to change the ranks of a model: tensors of other shapes, or slots that are zero."""
