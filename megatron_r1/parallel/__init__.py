"""Process groups, and what ranks say to each other."""
