"""Worker processes, signals and ports.

pool                an ordered map over worker processes
interruption        Ctrl-C and SIGTERM as exceptions that end work in order
ports               binding a server's port
"""
