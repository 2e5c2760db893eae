"""A generated world of general tasks: rewriting, lists, translation, personas, and requests to refuse."""
