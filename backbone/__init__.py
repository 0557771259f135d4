"""The networks, and everything that must agree between training and serving."""
