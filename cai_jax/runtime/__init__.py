"""What every part stands on: devices, processes, files, progress and errors."""
