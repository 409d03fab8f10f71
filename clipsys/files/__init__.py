"""Files and paths as users and drives have them.

expansion       ``~`` and environment variables in paths
regular         reading files, and refusing pipes, sockets and devices
user_cache      where what can be computed again is stored
drive_faults    full, read-only and failing drives, explained in one line
"""
