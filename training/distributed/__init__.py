"""Processes that train together.

agreement           proof that all ranks run the same and see the same files
collectives         ranks, gathering with gradients, and what rank 0 decides
environment         whether a launcher has started this process as one of several
launch              starting one process for each device of this machine
process_group       joining the group that a launcher prepared
rank_errors         what a rank leaves behind when it fails
"""
