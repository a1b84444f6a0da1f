"""What an optimizer will take, before anything is built: memory, traffic, checkpoints and time."""
