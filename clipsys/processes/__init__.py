"""Worker processes, signals, ports and memory.

pool                an ordered map over worker processes
interruption        Ctrl-C and SIGTERM as exceptions that end work in order
ports               binding a server's port
allocation          how the C library deals with memory that is freed
"""
