"""Ways to feed paired crops to a network, each as a generator of (low, full, names of the cases)."""
