"""The toy world, its exact scores, its subjects and the base that was pretrained on it.

This file makes the folder a package, so that an installed package of the same name isn't taken.
"""
