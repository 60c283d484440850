"""The cache: the stored states of one resource on one split. Needs h5py and NumPy alone.

``format`` is the contract, ``create`` makes the files, ``writer`` fills them, ``reader`` maps them.
"""
