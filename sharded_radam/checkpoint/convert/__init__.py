"""What one process makes of a checkpoint, without torch.distributed: the work behind the command line."""
