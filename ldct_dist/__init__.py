"""Train 3-D CNN denoisers for low-dose CT on any number of SLURM nodes."""

__version__ = "0.1.0"
