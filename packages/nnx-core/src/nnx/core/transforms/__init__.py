"""The lifted transforms: JAX's own, for functions of Modules."""
