"""Flat buffers: where parameters, moments and masters are."""
