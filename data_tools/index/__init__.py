# The core is there before a module of this folder imports it.
from data_tools.index.core import provide

provide()
