"""Which statistics a batch norm uses, and the one place where running statistics move."""
