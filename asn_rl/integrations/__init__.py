"""Adapters by which other libraries drive decoding policies."""
