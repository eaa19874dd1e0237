"""ONNX files in: reading them, and what each operator means in torch."""
