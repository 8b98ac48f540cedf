"""Time, accuracy and memory of a scan, against Spectrum's SVD and numpy's.

`README.md` explains the method and lists results.
"""
