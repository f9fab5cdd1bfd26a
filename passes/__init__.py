"""Built-in passes, one a file. Each registers through the entry point ``onnxcompress.passes``."""

if __name__ != "onnxcompress.passes":
    raise ImportError(f"import onnxcompress.passes, not {__name__}: the same code under two names breaks isinstance")
