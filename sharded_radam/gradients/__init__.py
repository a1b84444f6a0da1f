"""Gradients that are reduced to shards while the backward pass runs."""
