"""What lies on the disk: nothing here knows of torch.distributed."""
