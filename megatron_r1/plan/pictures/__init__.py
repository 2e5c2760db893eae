"""Pictures of a plan: pipeline and memory, in the terminal and as one HTML page."""
