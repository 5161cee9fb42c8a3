"""What PyTorch has once for the whole process, for one thread at a time."""

from __future__ import annotations

import threading
from typing import Final

from diffloss_engine.forking import fork_waits_for

# Held while PyTorch traces or compiles, while its precision of fp32 is changed for a while, and while diffusers is
# imported. torch.export and make_fx (torch 2.13) fail when two threads trace at once, settings that two threads change
# and restore are left changed, and diffusers (0.42) imports its parts late, in a way that fails beside another thread.
exclusive: Final = threading.RLock()
# In a process forked meanwhile the settings would stay changed, and the import would never end.
fork_waits_for(exclusive)
