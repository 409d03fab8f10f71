"""How fast this machine computes a tower's own products, measured once and kept.

machine     processor, cores that this process may use, versions: what a measurement is valid for
products    the products and convolutions of a tower, recorded without computing them
timing      medians of alternating rounds within a budget of time
figures     what one probe measured, and what follows from it
cache       figures stored in the user's cache folder
probing     a probe from end to end
"""
