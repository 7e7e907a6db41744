import time

STARTED = time.monotonic()  # before the modules of this package import torch
