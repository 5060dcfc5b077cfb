"""One thread for each process of an ingest. Imported before numpy, by the server that workers are forked from, and by them.

A worker has one core. The libraries that numpy and torch calculate with read this when they are loaded; threads of
theirs would take the cores of other workers, and make the server unsafe to fork from.
"""

import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the pool
