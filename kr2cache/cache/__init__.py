"""The cache: the stored states of one resource on one split. Needs h5py and NumPy alone.

``format`` is the contract, ``create`` makes files by it, ``writer`` fills them, ``reader`` maps them.
"""
