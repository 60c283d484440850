"""The machine: terminal, devices, disk, memory, network, other processes."""
