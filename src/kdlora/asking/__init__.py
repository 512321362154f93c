"""A large language model as the teacher: asked row by row over the usual protocol, audited, its answers kept."""
