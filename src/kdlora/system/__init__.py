"""What every package needs of the machine: child processes, atomic files, locks, versions."""
