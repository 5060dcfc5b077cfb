"""Imported first, before numpy, by the server that an ingest's workers are forked from, and by the workers.

A worker has one core. What numpy and torch multiply with reads this when it is loaded; threads of theirs would take
the cores of other workers, and make the server unsafe to fork from.
"""

import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the pool
