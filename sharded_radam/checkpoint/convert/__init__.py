"""What is made of checkpoints by one process."""
