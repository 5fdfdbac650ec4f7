"""Device meshes and multi-process training."""
