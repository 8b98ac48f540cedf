"""Time, accuracy and memory of a scan, against Spectrum's SVD and numpy's. `README.md` explains and lists results."""
