"""The cache: the stored states of one resource on one split. Needs h5py and NumPy alone.

``format`` is the contract, ``writer`` makes files by it, ``reader`` maps them.
"""
