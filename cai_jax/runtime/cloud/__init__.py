"""Folders in object stores: what a URL is, and a local folder that is kept equal to one."""
