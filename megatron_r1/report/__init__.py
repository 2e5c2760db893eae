"""The report of a recipe's results, on one page."""
