"""Processes that train together.

collectives         ranks, gathering with gradients, and what rank 0 decides
launch              starting one process for each device of this machine
process_group       joining the group that a launcher prepared
"""
