"""Pure tensor functions, one reference each. No configuration, no files, no models."""
