"""What a recipe came to, on one page."""
