"""What ranks tell each other through torch.distributed's store."""
