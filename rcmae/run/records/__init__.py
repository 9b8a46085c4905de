"""What a run writes of itself, on the console and into its folder, and what that says of it."""
