"""Serving one base model with many adapters in one batch."""
