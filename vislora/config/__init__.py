"""Every setting of every command, typed; conf/ gives the values, recipes/ combine them.

A group whose options differ in their keys has a class for each, so that a key which an option doesn't know is refused
before anything heavy is imported.
"""
