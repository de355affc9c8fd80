"""What is used around the framework: each room is one or two commands, and nothing of the core imports it."""
