"""What isn't the method: called by the scripts and by quant.py, and not needed to understand them.

This file makes the folder a package, so that an installed package of the same name isn't taken.
"""
