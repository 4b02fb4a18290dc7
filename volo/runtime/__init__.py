"""What any program of this project asks of the machine: processes, randomness, files, signals, exit codes."""
