"""What nnx costs beside raw JAX and beside its peers, each figure a ratio of sides measured in turn in one process."""
