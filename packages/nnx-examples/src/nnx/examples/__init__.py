"""Examples that train on real data, each a program: `python -m nnx.examples.digits`."""
