"""Where in a network something is taken: tensors in and out, no host."""
