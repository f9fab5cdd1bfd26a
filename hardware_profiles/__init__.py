"""Hardware profiles that come with the package: one TOML a device, read by :mod:`onnxcompress.profile`."""
