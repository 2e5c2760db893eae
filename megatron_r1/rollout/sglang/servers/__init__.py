"""Server processes: arguments, launch, supervision, restarts, memory, and where servers are found."""
