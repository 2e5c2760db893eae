"""What a weight sync will send where, and how long that takes, without a rank or a server running."""
