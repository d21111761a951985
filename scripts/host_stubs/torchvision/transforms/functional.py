"""Names that the host's upscaler library imports for architectures that our graphs do not use."""

InterpolationMode = normalize = rotate = None
